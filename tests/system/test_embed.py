"""The embed entry: what is in an index after it ran, ran again, was killed, or met another one."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from upath import UPath

from longclip.checkpoint import Checkpoint, checkpoint_id, new_model, save_checkpoint
from longclip.errors import CheckpointError, ConfigError, DataError
from longclip.index import PublishedIndex, SearchIndexError, parse_filter, version_directory, version_manifests
from pipelines import embed
from pipelines.common.embedding import EmbedRows
from serving.index_source import find_index, open_index
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.processes import kill_driver
from tests.support.rows import write_rows
from tests.support.s3_server import KEY, SECRET, S3Server
from tests.support.scenes_index import library_image_embedding, library_text_embedding
from tests.support.tiny_clip import tiny_config

Embed = Callable[..., str]


@pytest.fixture
def run(ray_cluster: None, capsys: pytest.CaptureFixture[str], tiny_checkpoint_dir: Path, tmp_path: Path) -> Embed:
    """Run the entry on an index in `tmp_path`; gives its closing line."""

    def run_settings(*settings: str, model: Path = tiny_checkpoint_dir) -> str:
        arguments = [f"model={model}", f"output={tmp_path}/index", f"cache={tmp_path}/cache", *settings]
        embed.main([part for setting in arguments for part in ("--set", setting)])
        return capsys.readouterr().out.strip().splitlines()[-1]

    return run_settings


@pytest.fixture(scope="module")
def two(ray_cluster: None, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two rows and an index of them, which stays as it is."""
    folder = tmp_path_factory.mktemp("two")
    rows = write_rows(folder / "rows.parquet", rows=2)
    embed.main(["--set", f"input={rows}", "--set", f"model={tiny_checkpoint_dir}", "--set", f"output={folder}/index"])
    return folder


def newest(directory: Path) -> PublishedIndex:
    return PublishedIndex.open(version_directory(directory, version_manifests(directory)[-1].version))


def content(index: PublishedIndex) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Caption and vectors of every item."""
    return {
        id: (caption, shard.vectors["image"][row], shard.vectors["caption"][row])
        for shard in index.shards
        for row, (id, caption) in enumerate(
            zip(shard.items["id"].to_pylist(), shard.items["caption"].to_pylist(), strict=True)
        )
    }


def assert_same_items(first: PublishedIndex, second: PublishedIndex) -> None:
    """Up to rounding, which depends on the other texts of a batch."""
    ours, theirs = content(first), content(second)
    assert ours.keys() == theirs.keys()
    for id, (caption, *vectors) in ours.items():
        assert caption == theirs[id][0]
        np.testing.assert_allclose(vectors, theirs[id][1:], atol=1e-5)


def test_index_equals_the_embeddings_of_the_library(run: Embed, tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=20, year=list(range(1990, 2010)))
    line = run(f"input={rows}", "metadata=[year]")
    assert "embed: 20 rows in, 20 out, 0 rejected" in line
    assert "20 embedded, 0 unchanged, 0 deleted" in line
    assert "version 1 published, 20 items, engine exact" in line
    index = newest(tmp_path / "index")
    ids = index.shards[0].items["id"].to_pylist()
    assert ids == [f"row-{number:03d}" for number in range(20)]
    captions = pq.read_table(rows)["caption"].to_pylist()
    images = library_image_embedding(tiny_checkpoint, *(picture(number) for number in range(20)))
    np.testing.assert_allclose(index.shards[0].vectors["image"], images, atol=1e-5)
    texts = library_text_embedding(tiny_checkpoint, *captions)
    np.testing.assert_allclose(index.shards[0].vectors["caption"], texts, atol=1e-5)
    (matches,) = index.search(images[:1], 20, filter=parse_filter({"year": {"lt": 1993}}, index.filter_schema))
    assert {match.metadata["year"] for match in matches} == {1990, 1991, 1992}


def test_only_changed_rows_are_embedded_again(run: Embed, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=12)
    run(f"input={rows}")
    assert "0 embedded, 12 unchanged, 0 deleted" in (line := run(f"input={rows}"))
    assert "version 1 as before, 12 items" in line
    table = pq.read_table(rows).to_pylist()
    table[3]["caption"] = "Something else is written here."
    table[7]["image"] = picture(99)
    new = [*table[:10], {**table[0], "id": "new"}]
    pq.write_table(pq.read_table(rows).from_pylist(new), rows)
    line = run(f"input={rows}")
    assert "embed: 11 rows in, 11 out, 0 rejected" in line
    assert "3 embedded, 8 unchanged, 0 deleted" in line
    assert "version 2 published, 13 items" in line, "what the data does not have stays"
    found = content(newest(tmp_path / "index"))
    assert found["row-003"][0] == "Something else is written here."
    np.testing.assert_allclose(found["new"][1:], found["row-000"][1:], atol=1e-5)
    line = run(f"input={rows}", "delete_missing=true")
    assert "0 embedded, 11 unchanged, 2 deleted" in line
    assert set(content(newest(tmp_path / "index"))) == {row["id"] for row in new}
    assert "1 deleted" in (line := run("delete=[row-001, nobody]"))
    assert "version 4 published, 10 items" in line


def test_another_model_recomputes_all_vectors_in_a_new_version(
    run: Embed, tmp_path: Path, tiny_checkpoint_dir: Path
) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=8)
    other = tmp_path / "other"
    torch.manual_seed(1)
    save_checkpoint(new_model(tiny_config()), other, {"origin": "test"})
    run(f"input={rows}")
    before = newest(tmp_path / "index")
    half = write_rows(tmp_path / "half.parquet", rows=4)
    with pytest.raises(DataError, match=r"4 of 8 items, the first 'row-00\d', were made with another checkpoint_id"):
        run(f"input={half}", model=other)
    assert "4 embedded, 4 unchanged" in run(f"input={rows}", model=other)
    first, second = version_manifests(tmp_path / "index")
    assert (first.checkpoint_id, second.checkpoint_id) == (checkpoint_id(tiny_checkpoint_dir), checkpoint_id(other))
    assert_same_items(PublishedIndex.open(version_directory(tmp_path / "index", 1)), before)


def test_rows_that_became_unreadable_are_deleted_from_the_index(run: Embed, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=10)
    run(f"input={rows}")
    write_rows(rows, rows=10, broken=(2,))
    line = run(f"input={rows}", "max_rejected_fraction=0.1")
    assert "embed: 10 rows in, 9 out, 1 rejected" in line
    assert "0 embedded, 9 unchanged, 1 deleted" in line
    (rejected,) = pq.read_table(tmp_path / "index" / "quarantine.parquet").to_pylist()
    assert (rejected["id"], rejected["stage"]) == ("row-002", "embed")
    assert "row-002" not in content(newest(tmp_path / "index"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["input="], ConfigError, "give a Parquet to embed"),
        (["input={rows}", "metadata=[image]"], DataError, r"column 'image' \(binary\) cannot be kept"),
        (["input={rows}", "metadata=[caption]"], DataError, "column 'caption' .* cannot be kept"),
        (["input={rows}", "metadata=[colour]"], DataError, "column 'colour' is missing"),
        (["input={rows}", "metadata=[summary]"], ConfigError, "column 'summary' of the index is missing, with these"),
        (["input={rows}", "caption_vectors=false"], ConfigError, "column 'caption_embedding' of the index is fixed"),
        (["delete=[row-000, row-001]"], DataError, "has no items"),
    ],
)
def test_mistakes(two: Path, run: Embed, settings: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        run(f"output={two}/index", *(setting.format(rows=two / "rows.parquet") for setting in settings))
    assert "\n" not in str(refused.value)
    assert len(version_manifests(two / "index")) == 1


def test_large_indexes_get_sharded_structures_that_pass_the_gate(run: Embed, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=150)
    settings = [f"input={rows}", "exact_rows=40", "shard_rows=60"]
    assert "150 items, engine ivf" in run(*settings)
    index = newest(tmp_path / "index")
    manifest = index.manifest
    assert [shard["rows"] for shard in manifest.shards] == [50, 50, 50]
    assert set(manifest.engine["probes"]) == {"image", "caption"}
    chosen = [row for row in manifest.gate if row["probes"] == manifest.engine["probes"][row["target"]]]
    assert all(row["recall"] >= 0.95 for row in chosen if row["queries"] == "text")
    queries = np.concatenate([shard.vectors["caption"][::9] for shard in index.shards])
    for exact, found in zip(index.search(queries, 10, exact=True), index.search(queries, 10), strict=True):
        assert found[0].score <= exact[0].score + 1e-6
        assert len(found) == 10


@pytest.mark.slow
def test_killed_run_resumes_after_its_last_commit(run: Embed, tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=400)
    directory = tmp_path / "killed"
    command = [sys.executable, "pipelines/embed.py"]
    settings = [f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={directory}", f"cache={tmp_path}/cache"]
    command += [part for setting in [*settings, "commit_rows=32"] for part in ("--set", setting)]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while (tmp_path / "log").read_text().count("rows embedded and written") < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_driver(process)
    assert version_manifests(directory) == []
    line = run(f"input={rows}", f"output={directory}", "commit_rows=32")
    embedded = int(line.split(" embedded")[0].split()[-1])
    assert 0 < embedded <= 400 - 3 * 32
    undisturbed = run(f"input={rows}")
    assert "400 embedded" in undisturbed
    assert_same_items(newest(directory), newest(tmp_path / "index"))


@pytest.mark.slow
def test_concurrent_runs_do_not_mix(run: Embed, tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", rows=1200)
    settings = [f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={tmp_path}/index", f"cache={tmp_path}/cache"]
    command = [sys.executable, "pipelines/embed.py"]
    command += [part for setting in [*settings, "commit_rows=8"] for part in ("--set", setting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        for printed in process.stdout:
            if "rows embedded and written" in printed:
                break
        with pytest.raises(ConfigError, match="is being written by another job"):
            run(f"input={rows}")
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "version 1 published, 1200 items" in rest
    assert len(content(newest(tmp_path / "index"))) == 1200


@pytest.mark.slow
def test_an_index_in_object_storage(
    run: Embed, tmp_path: Path, tiny_checkpoint_dir: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, changed and published there by a job of its own; found, downloaded and verified as serving does it."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_ENDPOINT_URL", s3_server.url),
    ):
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    UPath("s3://indexes").fs.makedirs("indexes", exist_ok=True)
    rows = write_rows(tmp_path / "rows.parquet", rows=40)
    place = "s3://indexes/corpus"
    command = [sys.executable, "pipelines/embed.py"]
    settings = [f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={place}", f"cache={tmp_path}/cache"]
    settings += ["exact_rows=30"]
    command += [part for setting in settings for part in ("--set", setting)]
    for version, extra in ((1, []), (2, ["--set", "delete=[row-003]", "--set", "input="])):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"version {version} published" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
    assert {path.name for path in UPath(place).iterdir()} >= {"table.lance", "published"}
    run(f"input={rows}")
    found = find_index(place, checkpoint_id(tiny_checkpoint_dir), str(tmp_path / "served"))
    assert (found.manifest.version, found.manifest.count, found.manifest.engine["name"]) == (2, 39, "ivf")
    assert "row-003" not in content(open_index(found))
    first = find_index(f"{place}@1", checkpoint_id(tiny_checkpoint_dir), str(tmp_path / "served"))
    assert_same_items(open_index(first), newest(tmp_path / "index"))
    downloaded = next((tmp_path / "served" / "indexes").glob("*/whole/0000/image.npy"))
    downloaded.write_bytes(downloaded.read_bytes()[:-1] + b"x")
    with pytest.raises(SearchIndexError, match=r"sha256 of image\.npy"):
        [open_index(version) for version in (found, first)]
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_error_names_a_machine_without_the_model() -> None:
    with pytest.raises(CheckpointError, match=r"^machine '.+': .*set cache to a directory that all nodes see"):
        EmbedRows("/absent/model", [], [])({"pixels": np.zeros((0, 2, 2, 3), np.uint8)})
