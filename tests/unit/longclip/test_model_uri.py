"""Names of registered models."""

import pytest

from longclip.errors import CheckpointError
from longclip.model_uri import ModelUri, is_model_uri, parse_model_uri


@pytest.mark.parametrize(
    ("uri", "parsed"),
    [
        ("models:/longclip/12", ModelUri("longclip", version="12")),
        ("models:/longclip@champion", ModelUri("longclip", alias="champion")),
    ],
)
def test_both_forms_are_parsed_and_printed(uri: str, parsed: ModelUri) -> None:
    assert is_model_uri(uri)
    assert parse_model_uri(uri) == parsed
    assert str(parsed) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "models:/",
        "models:/longclip",
        "models:/longclip@",
        "models:/longclip/latest",
        "models:/a/b/3",
        "models:/@x",
        "a/3",
    ],
)
def test_error_names_an_invalid_uri(uri: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither models:/NAME/VERSION nor models:/NAME@ALIAS"):
        parse_model_uri(uri)
