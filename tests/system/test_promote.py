"""Only better models become champion: real models better, worse and mixed; races, tampering, and the way back."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch.nn.functional import cross_entropy, normalize

from longclip.checkpoint import new_model, save_checkpoint, verify_checkpoint
from longclip.encode import encode_image, encode_text
from longclip.errors import CheckpointError, ConfigError, PromotionError
from longclip.evaluation.significance import compare_paired
from longclip.tokenizer import tokenize
from pipelines import promote, rollback
from pipelines.common.storage import JOB_PACKAGE
from pipelines.evaluation.gates import gate
from pipelines.evaluation.tasks import Protocol, Task
from pipelines.registry.registration import register_checkpoint
from pipelines.registry.versions import alias_version, move_alias, replaced_version
from tests.support.pictures import picture
from tests.support.tampering import TAMPERINGS
from tests.support.tiny_clip import tiny_config

ROWS = 24
LETTERS = "abcdefghijklmnopqrstuvwx"
LONG = [f"This is a long text. It goes on and on. At its end stands {letter * 3}." for letter in LETTERS]
SHORT = [f"{letter * 2} it is" for letter in LETTERS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, each with a long and a short text."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    images = [picture(row) for row in range(ROWS)]
    pq.write_table(pa.table({"id": list(LETTERS), "image": images, "long": LONG, "short": SHORT}), path)
    return path


def trained(directory: Path, texts: Sequence[Sequence[str]]) -> Path:
    """A tiny CLIP that has learned these texts of the pictures by heart."""
    torch.manual_seed(0)
    checkpoint = new_model(tiny_config())
    model, transform = checkpoint.model, checkpoint.transform
    pixels = transform.normalize(torch.from_numpy(np.stack([transform.pixels(picture(row)) for row in range(ROWS)])))
    batches = [tokenize(checkpoint.tokenizer, column) for column in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150 if texts else 0):
        optimizer.zero_grad()
        images = normalize(encode_image(model, pixels), dim=1)
        logits = [20 * images @ normalize(encode_text(model, batch), dim=1).T for batch in batches]
        right = torch.arange(ROWS)
        torch.stack([cross_entropy(way, right) for score in logits for way in (score, score.T)]).sum().backward()
        optimizer.step()
    model.eval()
    save_checkpoint(checkpoint, directory / "checkpoint", {"origin": "test"})
    return directory / "checkpoint"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What models have learned -> their directory."""
    root = tmp_path_factory.mktemp("models")
    learned: dict[str, list[list[str]]] = {"nothing": [], "short": [SHORT], "long": [LONG], "both": [LONG, SHORT]}
    return {name: trained(root / name, texts) for name, texts in learned.items()}


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registry of its own."""
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def run(data: Path, tmp_path: Path, uri: str) -> Callable[[], None]:
    """Promote what is candidate."""
    tasks = {name: {"input": str(data), "text": name, "source": {"caption": name}} for name in ("long", "short")}
    settings = [f"tasks={json.dumps(tasks)}", f"directory={tmp_path}/var", f"cache={tmp_path}/cache", "margin=0.15"]
    return lambda: promote.main([part for setting in settings for part in ("--set", setting)])


def registered(uri: str, directory: Path, alias: str) -> str:
    return str(register_checkpoint(uri, directory, "longclip", "tests", {}, alias))


def champion(uri: str) -> str | None:
    return alias_version(uri, "longclip", "champion")


@pytest.mark.slow
def test_only_a_better_model_is_promoted_and_only_once(
    ray_cluster: None,
    uri: str,
    models: dict[str, Path],
    run: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    registered(uri, models["short"], "candidate")
    run()
    assert champion(uri) == "1", "without a champion, the candidate becomes the champion"

    registered(uri, models["nothing"], "candidate")
    with pytest.raises(PromotionError, match=r"version 2 is not made 'champion', version 1 stays: . of 4 gates fail"):
        run()
    registered(uri, models["long"], "candidate")
    with pytest.raises(PromotionError, match=r"2 of 4 gates fail, first short text_to_image: .*must be interval above"):
        run()
    assert champion(uri) == "1"

    registered(uri, models["both"], "candidate")
    run()
    assert champion(uri) == "4"
    capsys.readouterr()
    run()
    assert "version 4 is 'champion' already" in capsys.readouterr().out

    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'longclip'")
    tracked = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    assert len(tracked) == 4
    documents = [
        json.loads(Path(client.download_artifacts(r.info.run_id, "comparison.json")).read_text()) for r in tracked
    ]
    assert [(d["champion"], d["candidate"], d["holds"]) for d in documents] == [
        (None, "1", True),
        ("1", "2", False),
        ("1", "3", False),
        ("1", "4", True),
    ]

    holds = [
        {name.removesuffix("/holds"): value for name, value in r.data.metrics.items() if name.endswith("/holds")}
        for r in tracked
    ]
    assert [len(gates) for gates in holds] == [0, 4, 4, 4]
    assert (holds[2]["short/text_to_image"], holds[2]["long/text_to_image"]) == (0, 1)
    assert set(holds[3].values()) == {1}
    lost = {name: tracked[2].data.metrics[f"short/text_to_image/{name}"] for name in ("difference", "low", "high")}
    assert lost["low"] < lost["difference"] < lost["high"] < 0
    assert [r.data.tags["promoted"] for r in tracked] == ["true", "false", "false", "true"]
    described = {number: client.get_model_version("longclip", number) for number in "1234"}
    tags = [described[number].tags for number in "1234"]
    assert [("promotion_run_id" in tag, "refusal_run_id" in tag) for tag in tags] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert tags[3]["promotion_run_id"] == tracked[3].info.run_id
    assert "Refused as `champion`: 2 of 4 gates fail." in described["3"].description
    assert "Made `champion` in place of nothing." in described["1"].description

    rollback.main([])
    assert champion(uri) == "1"
    with pytest.raises(PromotionError, match="version 1 of 'longclip' replaced none"):
        rollback.main([])
    rollback.main(["--set", "to_version=4"])
    assert champion(uri) == "4"


@pytest.mark.parametrize(
    ("text", "hits", "queries", "holds"),
    [
        ("long", 0, 1000, True),
        ("long", 40, 1000, True),
        ("long", -1, 1000, False),
        ("short", 0, 1000, True),
        ("short", -1, 1000, True),
        ("short", -5, 1000, True),
        ("short", -30, 1000, False),
        ("short", 0, 50, False),
        (None, 0, 1000, True),
        (None, -30, 1000, False),
    ],
)
def test_gates_by_kind_of_task(text: str | None, hits: int, queries: int, holds: bool) -> None:
    """So many hits more or less of so many queries, with the default margin of a point."""
    before, after = np.zeros(queries), np.zeros(queries)
    before[: max(0, -hits)] = 1
    after[: max(0, hits)] = 1
    protocol = Protocol.model_validate({"title": "x", "source": {}, "text": text})
    task = Task("x", protocol, None, None, False)  # type: ignore[arg-type]
    assert gate(task, "text_to_image", compare_paired(before, after), 0.01).holds is holds


@pytest.fixture
def versions(uri: str, tmp_path: Path) -> MlflowClient:
    """Eight versions without any content; the first is champion."""
    client = MlflowClient(uri)
    client.create_registered_model("longclip")
    for _ in range(8):
        client.create_model_version("longclip", source=str(tmp_path))
    client.set_registered_model_alias("longclip", "champion", "1")
    return client


def test_concurrent_promotions_have_one_winner(uri: str, versions: MlflowClient) -> None:
    def attempt(version: str) -> bool:
        try:
            move_alias(uri, "longclip", "champion", "1", version)
        except PromotionError:
            return False
        return True

    contenders = [str(number) for number in range(2, 9)]
    with ThreadPoolExecutor(7) as pool:
        moved = list(pool.map(attempt, contenders))
    winner = champion(uri)
    assert [version for version, done in zip(contenders, moved, strict=True) if done] == [winner]
    assert replaced_version(uri, "longclip", str(winner)) == "1"
    with pytest.raises(PromotionError, match=rf"was moved from version 1 to {winner} in the meantime"):
        move_alias(uri, "longclip", "champion", "1", "2")
    assert [model.name for model in versions.search_registered_models()] == ["longclip"], "the lock is given back"


def test_error_names_a_stale_lock(uri: str, versions: MlflowClient) -> None:
    versions.create_registered_model("longclip--champion-is-moved")
    with pytest.raises(PromotionError, match="delete the registered model 'longclip--champion-is-moved'"):
        move_alias(uri, "longclip", "champion", "1", "2")
    assert champion(uri) == "1"


@pytest.mark.slow
def test_tampered_version_is_rejected(
    ray_cluster: None, uri: str, tmp_path: Path, tiny_checkpoint_dir: Path, run: Callable[[], None]
) -> None:
    directory = tmp_path / "model" / "checkpoint"
    shutil.copytree(tiny_checkpoint_dir, directory)
    for alias in ("champion", "candidate"):
        registered(uri, directory, alias)
    candidate = max(tmp_path.glob("mlartifacts/**/model.safetensors"), key=os.path.getmtime).parent
    for reason, tamper in TAMPERINGS.items():
        tamper(candidate)
        with pytest.raises(CheckpointError, match=reason):
            run()
        assert champion(uri) == "1"
        shutil.rmtree(candidate)
        shutil.copytree(tiny_checkpoint_dir, candidate)


def test_links_in_a_checkpoint_are_rejected(tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    verify_checkpoint(tiny_checkpoint_dir)
    for file in tiny_checkpoint_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="is a link"):
        verify_checkpoint(tmp_path)


def test_submitted_rollback_needs_a_directory_only_without_a_registry(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / JOB_PACKAGE).mkdir()
    monkeypatch.chdir(tmp_path / JOB_PACKAGE)
    with pytest.raises(PromotionError, match="has no alias 'champion'"):
        rollback.main([])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="directory='var' is relative"):
        rollback.main([])


def test_promotion_needs_a_candidate_and_a_registry(
    uri: str, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromotionError, match="has no alias 'candidate'"):
        run()
    with pytest.raises(PromotionError, match="has no alias 'champion'"):
        rollback.main([])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"MLflow at '.*:9' cannot be used.*check MLFLOW_TRACKING_URI"):
        run()
