"""The registered model in MLflow's own hands: every kind of input, in this process and where only its code is."""

import base64
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from longclip.checkpoint import Checkpoint
from longclip.constants import MAX_IMAGE_BYTES, MAX_TEXT_CHARS
from longclip.encode import encode_image, encode_text, unit
from longclip.errors import CheckpointError
from longclip.tokenizer import tokenize
from pipelines.registry.registration import CORE, register_checkpoint
from tests.support.pictures import picture
from tests.support.places import ROOT

TEXTS = ["a dog", "two boats on a lake"]
IMAGES = [picture(1), picture(2)]
ENCODED = [base64.b64encode(image).decode() for image in IMAGES]
URI = f"data:image/jpeg;base64,{ENCODED[0]}"
LONG = "dog " * 300
EMPTY: list[Any] = [[], (), {}, {"text": []}, np.array([]), pd.DataFrame({"text": []}), pd.Series([], dtype=object)]


@pytest.fixture(scope="module")
def registry(tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    """A registry with version 1 of `longclip`."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    directory = shutil.copytree(tiny_checkpoint_dir, folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        register_checkpoint(uri, directory, "longclip", "tests", {}, "champion")
        yield MlflowClient(uri)
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def model(registry: MlflowClient) -> Any:
    return mlflow.pyfunc.load_model("models:/longclip@champion")


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Embeddings of all texts and images."""
    pixels = np.stack([tiny_checkpoint.transform.pixels(image) for image in IMAGES])
    with torch.inference_mode():
        texts = encode_text(tiny_checkpoint.model, tokenize(tiny_checkpoint.tokenizer, TEXTS))
        images = encode_image(tiny_checkpoint.model, tiny_checkpoint.transform.normalize(torch.from_numpy(pixels)))
    return {"text": unit(texts).numpy(), "image": unit(images).numpy()}


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ("a dog", ["text0"]),
        (TEXTS, ["text0", "text1"]),
        (tuple(TEXTS), ["text0", "text1"]),
        (np.array(TEXTS), ["text0", "text1"]),
        (np.array([[text] for text in TEXTS], object), ["text0", "text1"]),
        (pd.Series(TEXTS, name="caption", index=[7, 7]), ["text0", "text1"]),
        (pd.DataFrame({"text": TEXTS}, index=[3, 1]), ["text0", "text1"]),
        (pd.DataFrame(TEXTS), ["text0", "text1"]),
        ({"text": "a dog"}, ["text0"]),
        ({"text": TEXTS}, ["text0", "text1"]),
        ({"image": ENCODED}, ["image0", "image1"]),
        ({"text": np.array([TEXTS[1], None]), "image": [None, ENCODED[0]]}, ["text1", "image0"]),
        ([{"image": URI}, "a dog", {"text": TEXTS[1], "image": None}], ["image0", "text0", "text1"]),
        (pd.DataFrame({"text": [None, TEXTS[0]], "image": [ENCODED[1], None]}), ["image1", "text0"]),
        (pd.DataFrame({"image": IMAGES}), ["image0", "image1"]),
        (pd.Series(ENCODED, name="image"), ["image0", "image1"]),
        *[(empty, []) for empty in EMPTY],
    ],
)
def test_every_kind_of_input(model: Any, expected: dict[str, np.ndarray], given: Any, rows: list[str]) -> None:
    vectors = model.predict(given)
    assert len(vectors) == len(rows)
    for vector, row in zip(vectors, rows, strict=True):
        np.testing.assert_allclose(vector, expected[row[:-1]][int(row[-1])], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "row 0 is empty"),
        (7, "row 0 is of type int, not a text"),
        (["a", 7.5], "row 1 is of type float, not a text"),
        (["a", None], "row 1 is empty"),
        (pd.DataFrame({"text": ["a", float("nan")]}), "row 1 has neither 'text' nor 'image'"),
        ([" "], "row 0: the text is empty"),
        ([LONG], "row 0: the text has 302 tokens, the model reads 248"),
        (["x" * (MAX_TEXT_CHARS + 1)], "at most 100000 are allowed"),
        (["\ud800"], "row 0: the text is not valid Unicode"),
        (np.zeros((2, 3)), "row 0 is of type list"),
        ({"caption": TEXTS}, "the input has the column 'caption'; give texts, or rows with a 'text' or an 'image'"),
        (pd.DataFrame({"text": TEXTS, "id": [1, 2]}), "the input has the column 'id'"),
        (pd.DataFrame([TEXTS, TEXTS], columns=["text", "text"]), "two columns of the same name"),
        ([{"texts": "a"}], "row 0 has 'texts'"),
        ({"text": TEXTS, "image": ENCODED[:1]}, "the columns differ in length (2 of 'text' and 1 of 'image')"),
        ({"text": "a", "image": URI}, "row 0 has both 'text' and 'image'"),
        ([{"image": "http://localhost/a.png"}], "row 0: the image is not valid base64"),
        ([{"image": 3}], "row 0: the image is of type int"),
        ([{"image": base64.b64encode(b"not an image").decode()}], "row 0: image of 12 bytes cannot be decoded"),
        ([{"image": "A" * (MAX_IMAGE_BYTES * 4 // 3 + 8)}], "row 0: the image has more than 20971520 bytes"),
        ([{"image": bytes(MAX_IMAGE_BYTES + 1)}], "row 0: the image has more than 20971520 bytes"),
    ],
)
def test_wrong_input_is_one_line(model: Any, given: Any, message: str) -> None:
    with pytest.raises(MlflowException) as refused:
        model.predict(given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_long_texts_are_cut_on_request(model: Any) -> None:
    (cut,), (same,) = (model.predict([text], params={"truncate": True}) for text in (LONG, "dog " * 246))
    np.testing.assert_allclose(cut, same, atol=1e-6)


def test_more_rows_than_a_batch_keep_their_order(model: Any, expected: dict[str, np.ndarray]) -> None:
    vectors = model.predict([*TEXTS, *({"image": image} for image in ENCODED)] * 40)
    np.testing.assert_allclose(
        vectors, np.tile(np.concatenate([expected["text"], expected["image"]]), (40, 1)), atol=1e-5
    )


def test_signature_example_and_requirements(model: Any, registry: MlflowClient) -> None:
    signature = model.metadata.signature
    assert "Array(double)" in str(signature.outputs)
    assert [(param.name, param.default) for param in signature.params] == [("truncate", False)]
    assert [list(row) for row in model.input_example] == [["text"], ["image"]]
    assert np.shape(model.predict(model.input_example)) == (2, 24)
    file = mlflow.artifacts.download_artifacts(artifact_uri="models:/longclip/1/requirements.txt")
    pinned = dict(line.split("==") for line in Path(file).read_text().split())
    assert pinned == {name: metadata.version(name).partition("+")[0] for name in (*CORE, "mlflow")}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(line.partition(">")[0] for line in declared) == sorted(CORE)


def test_a_damaged_model_is_not_loaded(registry: MlflowClient, tmp_path: Path) -> None:
    directory = mlflow.artifacts.download_artifacts(artifact_uri="models:/longclip/1", dst_path=str(tmp_path))
    weights = Path(directory) / "artifacts" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"the content of 'model\.safetensors' was changed"):
        mlflow.pyfunc.load_model(directory)


REQUESTS: list[tuple[dict[str, Any], list[str] | str]] = [
    ({"inputs": "a dog"}, ["text0"]),
    ({"inputs": TEXTS}, ["text0", "text1"]),
    ({"inputs": {"text": TEXTS}}, ["text0", "text1"]),
    ({"inputs": [{"text": TEXTS[0]}, {"image": ENCODED[0]}]}, ["text0", "image0"]),
    ({"inputs": []}, []),
    ({"instances": TEXTS}, ["text0", "text1"]),
    ({"instances": [{"image": image} for image in ENCODED]}, ["image0", "image1"]),
    ({"instances": []}, []),
    ({"dataframe_split": {"columns": ["text", "image"], "data": [[TEXTS[0], None], [None, URI]]}}, ["text0", "image0"]),
    ({"dataframe_split": {"data": [[text] for text in TEXTS]}}, ["text0", "text1"]),
    ({"dataframe_split": {"columns": ["text"], "data": []}}, []),
    ({"dataframe_records": [{"text": TEXTS[0]}, {"image": ENCODED[1]}]}, ["text0", "image1"]),
    ({"dataframe_records": []}, []),
    ({"inputs": [LONG]}, "row 0: the text has 302 tokens, the model reads 248"),
    ({"inputs": [LONG], "params": {"truncate": True}}, ["any"]),
    ({"instances": [{"text": "a"}, {"image": URI}]}, "send texts and images together as 'inputs'"),
    ({"inputs": [{"caption": "a"}]}, "row 0 has 'caption'"),
]


def test_the_carried_code_serves_all_formats_without_this_repository(
    registry: MlflowClient, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    directory = mlflow.artifacts.download_artifacts(artifact_uri="models:/longclip/1", dst_path=str(tmp_path))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "carried_code.py", directory],
        input="".join(f"{json.dumps(request)}\n" for request, _ in REQUESTS),
        cwd=tmp_path,
        env={"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (request, wanted), (status, answer) in zip(REQUESTS, answers, strict=True):
        if isinstance(wanted, str):
            assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), request
            assert wanted in answer["message"]
            continue
        assert status == 200, (request, answer)
        assert len(answer["predictions"]) == len(wanted)
        for vector, row in zip(answer["predictions"], wanted, strict=True):
            if row != "any":
                np.testing.assert_allclose(vector, expected[row[:-1]][int(row[-1])], atol=1e-6)
