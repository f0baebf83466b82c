"""Prompts: files, placeholders, what is filled in and what is left out; settings of the job."""

from pathlib import Path
from typing import Any

import pytest

from longclip.errors import ConfigError
from pipelines.common.settings import documented, load_settings
from pipelines.data.captions.prompting import Prompt, load_prompt, value_text
from pipelines.data.captions.settings import CaptionSettings, Checks

REQUIRED = {"input": "x", "output": "y", "endpoint": {"url": "http://server/v1", "model": "eyes"}}


def settings_of(**values: Any) -> CaptionSettings:
    return CaptionSettings.model_validate(REQUIRED | values)


def settings_error(*sets: str) -> str:
    """The one-line error for wrong settings."""
    base = ("input=x", "output=y", "endpoint.url=http://server/v1", "endpoint.model=eyes")
    with pytest.raises(ConfigError) as error:
        load_settings(CaptionSettings, "", [part for each in (*base, *sets) for part in ("--set", each)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_packaged_prompts() -> None:
    plain, expand = load_prompt(settings_of()), load_prompt(settings_of(prompt="expand"))
    assert "in one paragraph of 85 to 172 words, in English." in plain.filled({})
    assert "{" not in plain.filled({})
    assert "briefly as: A dog" in expand.filled({"caption": ["A dog"]})
    assert "briefly as: A dog. Two dogs." in expand.filled({"caption": ["A dog", "Two dogs"]})
    without = expand.filled({"caption": []})
    assert "briefly" not in without, "a line without its column is left out"
    assert "Describe this image" in without
    assert (expand.lacks({"caption": []}), expand.lacks({"caption": ["A dog"]})) == (True, False)
    assert len({plain.digest, expand.digest}) == 2


def test_columns_are_filled_in_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("\ufeffThe class is {class}.\r\nNumber {n}, {caption}\n", encoding="utf-8")
    prompt = load_prompt(settings_of(prompt=str(path), source={"keep": ["class", "n"]}))
    row = {"class": "{caption} {x} \\1 {0}", "n": 0, "caption": "a\nb"}
    assert prompt.filled(row) == "The class is {caption} {x} \\1 {0}.\nNumber 0, a b"
    assert prompt.filled({"class": None, "n": 3, "caption": "x"}) == "Number 3, x"
    assert [value_text(value) for value in (None, " ", [None, ""], 0, 1.5, "half \ud83d")] == [
        "",
        "",
        "",
        "0",
        "1.5",
        "half",
    ]


def test_wrong_prompts_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt='none' cannot be read: No such file .*, or one of describe, expand"):
        load_prompt(settings_of(prompt="none"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_prompt(settings_of(prompt=str(tmp_path / "latin.txt")))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_prompt(settings_of(prompt=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"placeholder \{clas\} is unknown; allowed are .*\{caption\}, \{class\}"):
        Prompt("The {clas}", ("caption", "class"), Checks())
    with pytest.raises(ConfigError, match="the file is empty"):
        Prompt(" \n", (), Checks())


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["strategy=vllm"], "strategy vllm needs a model; set vllm.model to a directory, hub name or URI"),
        (["endpoint.url=null"], "set endpoint.url, e.g. http://localhost:8000/v1"),
        (["checks.min_tokens=230"], "min_tokens=230 is not below max_tokens=230"),
        (["checks.max_tokens=249"], "checks.max_tokens"),
        (["source.keep=[caption]"], "source.keep='caption' is a column of the output"),
        (["source.keep=[description]"], "prepare would read this column instead of the new caption"),
        (["limit=0"], "limit"),
        (["max_total_tokens=-1"], "max_total_tokens"),
        (["price_per_million.input=-1"], "price_per_million.input"),
    ],
)
def test_wrong_settings_are_one_line(sets: list[str], expected: str) -> None:
    assert expected in settings_error(*sets)


def test_every_setting_is_documented() -> None:
    assert not [key for key, text in documented(CaptionSettings).items() if not text.strip()]
