"""Resolving the model to serve: directories, and versions and aliases of a real MLflow registry."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from longclip.checkpoint import MANIFEST, Checkpoint, checkpoint_id
from longclip.errors import CheckpointError
from longclip.files import file_sha256
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG
from serving.app import AppArgs, ApplicationError, build
from serving.model_source import fetch_model, open_model
from tests.support.s3_server import free_ports
from tests.support.scenes_index import change_manifest, write_index
from tests.support.tampering import TAMPERINGS

PYFUNC = """
import mlflow

class Embedding(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input):
        raise RuntimeError("serving must not run the code of a registered model")

mlflow.models.set_model(Embedding())
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint_dir: Path) -> Iterator[MlflowClient]:
    """A registry with `longclip` version 1, alias champion; yields the MLflow client."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    checkpoint = Path(shutil.copytree(tiny_checkpoint_dir, folder / "checkpoint"))
    code = folder / "embedding.py"
    code.write_text(PYFUNC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.create_experiment("serving", artifact_location=str(folder / "artifacts"))
        with mlflow.start_run(experiment_id=experiment):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code),
                artifacts={"checkpoint": str(checkpoint)},
                pip_requirements=[],
            )
        mlflow.register_model(f"models:/{logged.model_id}", "longclip")
        client = MlflowClient()
        client.set_registered_model_alias("longclip", "champion", "1")
        client.set_model_version_tag("longclip", "1", MANIFEST_TAG, file_sha256(checkpoint / MANIFEST))
        yield client
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("uri", ["models:/longclip/1", "models:/longclip@champion"])
def test_a_registered_model_is_resolved_and_downloaded(
    registry: MlflowClient, uri: str, tmp_path: Path, tiny_checkpoint_dir: Path
) -> None:
    model = open_model(uri, str(tmp_path / "cache"))
    assert (model.location.name, model.version, model.location.uri) == ("longclip", "1", "models:/longclip/1")
    assert model.checkpoint_id == checkpoint_id(tiny_checkpoint_dir)
    assert (model.context_length, model.embedding_dim, model.transform.image_size) == (248, 24, 32)
    directory = fetch_model(model)
    assert {file.name for file in directory.iterdir()} == {file.name for file in tiny_checkpoint_dir.iterdir()}
    assert list((tmp_path / "cache").iterdir()) == [directory], "one complete download and no temporary files"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/longclip@nobody", "cannot be found in the registry"),
        ("models:/longclip/7", "cannot be found in the registry"),
        ("models:/absent/1", "cannot be found in the registry"),
        ("models:/longclip", "neither models:/NAME/VERSION nor"),
        ("models:/longclip/latest", "neither models:/NAME/VERSION nor"),
        ("models:/@champion", "neither models:/NAME/VERSION nor"),
    ],
)
def test_an_unknown_model_is_refused(registry: MlflowClient, model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        open_model(model, str(tmp_path))
    assert "\n" not in str(refused.value)


def test_without_a_tracking_uri_no_registry_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="MLFLOW_TRACKING_URI is not set"):
        open_model("models:/longclip@champion", str(tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_checkpoint_is_refused(registry: MlflowClient, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    registry.create_registered_model("bare")
    registry.create_model_version("bare", str(empty))
    with pytest.raises(CheckpointError, match="cannot download artifacts/checkpoint of 'models:/bare/1'"):
        open_model("models:/bare/1", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def stored(registry: MlflowClient, tmp_path: Path) -> Iterator[Path]:
    """Directory of the registered model in the registry; restored after the test."""
    place = Path(registry.get_model_version_download_uri("longclip", "1").removeprefix("file://"))
    shutil.copytree(place, tmp_path / "before")
    yield place
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "before", place)


@pytest.mark.parametrize("reason", TAMPERINGS)
def test_a_modified_version_is_refused(stored: Path, tmp_path: Path, reason: str) -> None:
    model = open_model("models:/longclip/1", str(tmp_path / "builder"))
    TAMPERINGS[reason](stored / CHECKPOINT_ARTIFACT)
    with pytest.raises(CheckpointError, match=reason):
        open_model("models:/longclip/1", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == [], "refused downloads are not kept"
    TAMPERINGS[reason](fetch_model(model))
    with pytest.raises(CheckpointError, match=reason):
        fetch_model(model)


def test_code_of_a_registered_model_is_not_run(stored: Path, tmp_path: Path) -> None:
    """MLflow itself would import the loader that an `MLmodel` names, whatever it forbids to unpickle."""
    canary = tmp_path / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    (stored / "code").mkdir()
    (stored / "code" / "loader.py").write_text(code)
    (stored / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: loader\n    code: code\n")
    for file in stored.glob("*.py"):
        file.write_text(code)
    open_model("models:/longclip/1", str(tmp_path / "cache"))
    assert not canary.exists()
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_a_cached_model_needs_no_registry(
    registry: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the registry is down, a restarted replica uses the cached files, and the builder reports the error."""
    model = open_model("models:/longclip@champion", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(None)  # this also unsets the environment variable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert checkpoint_id(fetch_model(model)) == model.checkpoint_id
    with pytest.raises(CheckpointError, match=r"cannot be found in the registry \(MLFLOW_TRACKING_URI\)") as refused:
        open_model("models:/longclip@champion", str(tmp_path / "cache"))
    assert "\n" not in str(refused.value)


def test_the_application_is_built_from_the_registry(
    registry: MlflowClient, tmp_path: Path, tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path
) -> None:
    index = write_index(tmp_path / "index", tiny_checkpoint, tiny_checkpoint_dir, count=2)
    build(AppArgs(model="models:/longclip@champion", index=str(index), cache=str(tmp_path / "cache")))
    change_manifest(index / "published" / "000001", checkpoint_id="0" * 16)
    with pytest.raises(ApplicationError, match="was made with checkpoint 0000"):
        build(AppArgs(model="models:/longclip@champion", index=str(index), cache=str(tmp_path / "cache")))


def test_a_directory_needs_no_registry(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_checkpoint_dir), str(tmp_path / "cache"))
    assert (model.location.name, model.version) == ("tiny", checkpoint_id(tiny_checkpoint_dir))
    assert fetch_model(model) == tiny_checkpoint_dir
    assert not (tmp_path / "cache").exists()


def test_a_changed_checkpoint_is_refused(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint_dir, tmp_path / "copy"))
    model = open_model(str(copy), str(tmp_path))
    with open(copy / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    with pytest.raises(CheckpointError, match="deploy again"):
        fetch_model(model)
