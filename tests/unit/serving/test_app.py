"""Building the application: its arguments, and errors as `serve run` prints them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli

from longclip.checkpoint import Checkpoint, checkpoint_id
from serving.app import AppArgs, ApplicationError, build
from tests.support.places import ROOT
from tests.support.scenes_index import write_index, write_version


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument 'model' is missing; set model=VALUE (checkpoint directory, models:/NAME/VERSION or"),
        (["modle=m"], "unknown argument 'modle'; did you mean 'model'?"),
        (["model=m", "xyzzy=1"], "unknown argument 'xyzzy'; there are model, index, cache, replicas, "),
        (["model=m", "replicas=two"], "replicas=two: input should be a valid integer"),
        (["model=m", "replicas=0"], "replicas=0: input should be greater than or equal to 1"),
        (["model=m", "precision=float16"], "precision=float16: input should be 'float32' or 'bfloat16'"),
        (["model=m", "replicas=3", "max_replicas=2"], "max_replicas=2 is less than replicas=3; raise it, or leave it"),
        (["model=m", "retrievers=2"], "retrievers=2 needs an index to share; set index=INDEX too"),
        (["model=models:/longclip"], "model 'models:/longclip' is neither models:/NAME/VERSION nor models:/NAME@ALIAS"),
        (["model=/nowhere/longclip"], "checkpoint '/nowhere/longclip'"),
    ],
)
def test_serve_run_prints_argument_errors_as_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["run", "serving.app:build", *arguments])
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "Running import path" not in line]
    assert line.startswith(f"Error: {message}")


def test_image_hosts_can_be_separated_by_commas() -> None:
    arguments = AppArgs.model_validate({"model": "m", "image_hosts": "a.example, b.example:8443"})
    assert arguments.image_hosts == ["a.example", "b.example:8443"]
    assert AppArgs(model="m", image_hosts=["a.example"]).image_hosts == ["a.example"]


def test_the_error_for_a_missing_index_names_it(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ApplicationError, match="nothing") as refused:
        build(AppArgs(model=str(tiny_checkpoint_dir), index=str(tmp_path / "nothing")))
    assert "\n" not in str(refused.value)


def test_a_damaged_index_is_refused(tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "index", tiny_checkpoint, tiny_checkpoint_dir, count=2)
    (index / "published" / "000001" / "0000" / "items.arrow").write_bytes(b"")
    with pytest.raises(ApplicationError, match=r"sha256 of items\.arrow"):
        build(AppArgs(model=str(tiny_checkpoint_dir), index=str(index)))


def test_too_few_retrievers_are_refused(tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    vectors = {"image": np.eye(20, 24, dtype=np.float32)}
    items = pa.table({"id": [str(row) for row in range(20)], "caption": [""] * 20, "thumbnail": [b""] * 20})
    write_version(tmp_path, 1, items, vectors, shards=17, checkpoint_id=checkpoint_id(tiny_checkpoint_dir))
    with pytest.raises(ApplicationError, match=r"retrievers=2: the index has 17 shards.*set retrievers=3 or more"):
        build(AppArgs(model=str(tiny_checkpoint_dir), index=str(tmp_path), retrievers=2))


def test_short_api_keys_are_refused_without_repeating_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCLIP_API_KEYS", "a-long-enough-key-0123, short-secret")
    with pytest.raises(ApplicationError, match="key 2 has 12 characters, but at least 16 are required") as refused:
        build(AppArgs(model="unused"))
    assert "short-secret" not in str(refused.value)


def test_serve_yaml_is_valid() -> None:
    config = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serving.app:build"
    assert config["http_options"]["host"] == "127.0.0.1"
    AppArgs.model_validate(application.args)
