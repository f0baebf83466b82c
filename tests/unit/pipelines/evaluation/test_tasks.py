"""Evaluation sets in their true layouts, with few images: found, read, and refused when they are not complete."""

import hashlib
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines import benchmark
from pipelines.common.storage import Storage
from pipelines.data.sources import cifar
from pipelines.data.sources.source import SourceRow
from pipelines.evaluation.tasks import (
    CLASSES,
    Task,
    TaskSettings,
    label_classes,
    lines_of,
    open_task,
    protocols,
    templates_of,
)
from tests.support.broken_rows import jpeg
from tests.support.places import ROOT
from tests.support.question_sets import write

STEMS = ["1", "2", "3"]


def write_images(folder: Path, stems: list[str]) -> None:
    for number, stem in enumerate(stems):
        write(folder / f"{stem}.jpg", jpeg(number))


def coco5k(root: Path) -> None:
    write_images(root / "val2017", [f"{int(stem):012d}" for stem in STEMS])
    images = [{"id": int(stem), "file_name": f"{int(stem):012d}.jpg"} for stem in STEMS]
    captions = [{"image_id": int(stem), "caption": f"{stem} {n}"} for n in range(5) for stem in STEMS]
    captions.append({"image_id": 1, "caption": "a sixth"})
    write(root / "annotations" / "captions_val2017.json", {"images": images, "annotations": captions})


def flickr30k_1k(root: Path) -> None:
    write_images(root / "flickr30k-images", [*STEMS, "4"])
    images = [
        {"filename": f"{s}.jpg", "imgid": s, "split": split, "sentences": [{"raw": f"{s} {n}"} for n in range(5)]}
        for s, split in [("1", "test"), ("4", "train"), ("2", "test"), ("3", "test")]
    ]
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def flickr30k_full(root: Path) -> None:
    write_images(root / "flickr30k-images", STEMS)
    lines = [f"{stem}.jpg#{n}\t{stem} {n}\n" for stem in STEMS for n in range(5)]
    write(root / "results_20130124.token", "".join(lines))


def sharegpt4v(root: Path, rows: int) -> None:
    stems = [str(number) for number in range(1, rows + 4)]
    write_images(root / "data" / "sam" / "images", STEMS)
    answers = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "long"}]
    entries = [{"id": stem, "image": f"sam/images/{stem}.jpg", "conversations": answers} for stem in stems]
    write(root / "share-captioner_coco_lcs_sam_1246k_1107.json", entries)


def sharegpt4v_1k(root: Path) -> None:
    sharegpt4v(root, 1000)


def sharegpt4v_10k(root: Path) -> None:
    sharegpt4v(root, 10000)


def urban1k(root: Path) -> None:
    write_images(root / "image", STEMS)
    for stem in STEMS:
        write(root / "caption" / f"{stem}.txt", f"long {stem}")


def docci(root: Path) -> None:
    write_images(root / "images", [f"test_{stem}" for stem in STEMS])
    rows = [
        {"example_id": f"{split}_{s}", "split": split, "image_file": f"{split}_{s}.jpg", "description": f"long {s}"}
        for split in ("train", "test", "qual_dev")
        for s in STEMS
    ]
    write(root / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, rows)))


def dci(root: Path) -> None:
    write_images(root / "photos", STEMS)
    for stem in STEMS:
        item = {"image": f"{stem}.jpg", "short_caption": "short", "extra_caption": f"extra {stem}", "mask_data": {}}
        write(root / "annotations" / f"{stem}.json", item)


def long_dci(root: Path) -> None:
    write_images(root / "SA1B" / "sa_138", STEMS)
    rows = [f'sa_138/{stem}.jpg\t"A ""long"" text,\nof two lines."\n' for stem in STEMS]
    write(root / "dci_long.csv", "".join(["filepath\ttitle\n", *rows]))


def iiw(root: Path) -> None:
    write_images(root / "images", STEMS)
    rows = [{"image/key": stem, "image/url": "", "IIW": f"long {stem}", "IIW-P5B": "x"} for stem in STEMS]
    write(root / "data.jsonl", "\n".join(map(json.dumps, rows)))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "coco5k": coco5k,
    "flickr30k-1k": flickr30k_1k,
    "flickr30k-full": flickr30k_full,
    "sharegpt4v-1k": sharegpt4v_1k,
    "sharegpt4v-10k": sharegpt4v_10k,
    "long-dci": long_dci,
    "urban1k": urban1k,
    "docci": docci,
    "dci": dci,
    "iiw": iiw,
}


def opened(name: str, data: Path, **settings: Any) -> Task:
    return open_task(name, TaskSettings(input=str(data), **settings), Storage())


def rows_of(task: Task, scratch: Path) -> list[SourceRow]:
    scratch.mkdir(exist_ok=True)
    source = pickle.loads(pickle.dumps(task.source))  # noqa: S301
    return [row for piece in source.pieces(UPath(scratch)) for row in source.read(piece)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_in_its_own_layout_is_read(name: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    LAYOUTS[name](root)
    task = opened(name, root)
    rows = rows_of(task, tmp_path / "scratch")
    if name.startswith("sharegpt4v"):
        assert len(rows) == protocols()[name].expected_images
        rows = rows[:3]
    assert [row.problem for row in rows] == [None] * 3
    assert [row.image for row in rows] == [jpeg(0), jpeg(1), jpeg(2)]
    protocol = protocols()[name]
    assert {len(row.captions[: protocol.captions_per_image]) for row in rows} == {protocol.captions_per_image or 1}
    if name == "dci":
        assert rows[0].captions == ["short\nextra 1"]
    if name == "long-dci":
        assert rows[0].captions == ['A "long" text,\nof two lines.']
    # An incomplete protocol is rejected unless it is allowed; then the name of the result says so.
    with pytest.raises(DataError, match=rf"has 3 of the {protocol.expected_images} images of {name}.*subset=true"):
        task.check_counts(3, 3)
    subset = opened(name, root, subset=True).check_counts(3, 3)
    assert subset == f"NOT {name}: only 3 of the {protocol.expected_images} images of {name}"
    assert protocol.expected_images is not None
    assert task.check_counts(protocol.expected_images, protocol.expected_texts) == name
    with pytest.raises(DataError, match="texts of"):
        task.check_counts(protocol.expected_images, 1)


def test_error_names_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no annotations/captions_val2017\.json or captions_val2017\.json"):
        opened("coco5k", tmp_path)
    with pytest.raises(ConfigError, match=r"tasks\.a\.protocol='coco' is unknown; known are coco5k, "):
        opened("a", tmp_path, protocol="coco")
    with pytest.raises(ConfigError, match=r"templates='mine' is unknown; known are openai, simple"):
        opened("a", tmp_path, kind="zero_shot", templates="mine")
    flickr30k_1k(tmp_path / "set")
    annotations = tmp_path / "set" / "dataset_flickr30k.json"
    annotations.write_text(annotations.read_text().replace('"test"', '"val"'))
    with pytest.raises(DataError, match=r"has no entry with source\.split='test'"):
        opened("flickr30k-1k", tmp_path / "set")
    pq.write_table(pa.table({"id": ["1"], "image": [b"x"], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"source\.split does not apply to parquet"):
        opened("mine", tmp_path / "x.parquet", source={"split": "test"})


@pytest.mark.parametrize(
    ("name", "folders", "problem"),
    [
        ("urban1k", [], "has no caption/ and no image/; give the directory that has caption/ and image/"),
        ("urban1k", ["caption"], "has no image/; give the directory that has caption/ and image/"),
        ("urban1k", ["caption", "image"], "has no entry that urban1k could read"),
        ("dci", ["photos"], "has no annotations/; give the directory that has annotations/ and photos/"),
        ("imagenet", ["empty"], "has no entry that class_folders could read"),
    ],
)
def test_a_wrong_folder_is_refused_when_it_is_opened(
    name: str, folders: list[str], problem: str, tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match=rf"tasks\.{name}\.input='{tmp_path}' {problem}"):
        opened(name, tmp_path)


def test_error_names_broken_annotations_of_dci(tmp_path: Path) -> None:
    dci(tmp_path / "set")
    write(tmp_path / "set" / "annotations" / "2.json", "{")
    write(tmp_path / "set" / "annotations" / "3.json", {"image": "3.jpg", "short_caption": "x"})
    rows = rows_of(opened("dci", tmp_path / "set"), tmp_path / "scratch")
    assert [bool(row.problem) for row in rows] == [False, True, True]
    assert "'3.json' is not a DCI annotation: KeyError" in str(rows[2].problem)


def cifar_records(label_bytes: int) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels = [[9] * (label_bytes - 1) + [number] for number in (3, 0, 9, 3)]
    return pixels, b"".join(bytes(label) + image.tobytes() for label, image in zip(labels, pixels, strict=True))


@pytest.mark.parametrize(
    ("name", "file", "label_bytes"), [("cifar10", "test_batch.bin", 1), ("cifar100", "test.bin", 2)]
)
def test_cifar_is_read_without_pickle(name: str, file: str, label_bytes: int, tmp_path: Path) -> None:
    pixels, content = cifar_records(label_bytes)
    write(tmp_path / "set" / file, content)
    task = opened(name, tmp_path / "set")
    rows = rows_of(task, tmp_path / "scratch")
    for row, image in zip(rows, pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row.image))), image.transpose(1, 2, 0))
    names, labels = label_classes(task, [row.captions[0] for row in rows])
    assert len(names) == int(name.removeprefix("cifar"))
    first = ["cat", "airplane", "truck", "cat"] if name == "cifar10" else ["bear", "apple", "bottle", "bear"]
    assert [names[label] for label in labels] == first
    write(tmp_path / "set" / file, content[:-1])
    with pytest.raises(DataError, match="not a multiple of"):
        opened(name, tmp_path / "set")


def test_the_archive_of_cifar_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, content = cifar_records(1)
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="instead of c32a1d4ab5d03f1284b67883e8d87530"):
        opened("cifar10", path)
    known = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.ARCHIVES, path.name, ("cifar-10-batches-bin/test_batch.bin", known))
    assert [row.captions for row in rows_of(opened("cifar10", path), tmp_path / "scratch")] == [
        ["3"],
        ["0"],
        ["9"],
        ["3"],
    ]


def test_folders_of_classes(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n02012849"):
        write_images(tmp_path / "set" / wnid, STEMS[:2])
    labels = [row.captions[0] for row in rows_of(opened("imagenet-o", tmp_path / "set"), tmp_path / "scratch")]
    assert labels == ["n01440764"] * 2 + ["n02012849"] * 2
    assert label_classes(opened("imagenet-o", tmp_path / "set"), labels) == (["tench", "crane bird"], [0, 0, 1, 1])
    names, found = label_classes(opened("imagenet", tmp_path / "set"), labels)
    assert (len(names), found) == (1000, [0, 0, 134, 134])
    assert label_classes(opened("imagenet-v2", tmp_path / "set"), ["0", "134"])[1] == [0, 134]
    with pytest.raises(DataError, match=r"label 'n0' is not a class of imagenet\.txt"):
        label_classes(opened("imagenet", tmp_path / "set"), ["n0"])
    own = opened("own", tmp_path / "set", kind="zero_shot", source={"format": "class_folders"})
    assert label_classes(own, ["b_c", "a", "b_c"]) == (["a", "b c"], [1, 0, 1])


def test_labels_of_a_parquet_may_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [jpeg(0), jpeg(1)], "label": [1, 0]}), path)
    classes = write(tmp_path / "names.txt", "cat\ndog\n")
    task = opened("own", path, kind="zero_shot", source={"label": "label"}, classes=str(classes))
    labels = [row.captions[0] for row in rows_of(task, tmp_path / "scratch")]
    assert label_classes(task, labels) == (["cat", "dog"], [1, 0])
    assert task.check_counts(2, None) == "own data: 2 images"


def test_every_protocol_is_documented() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    listed = re.split(r"[\s,(;)]+", str(benchmark.__doc__))
    for name in protocols():
        assert name in listed
        assert f"`{name}`" in page


def test_files_of_classes_and_templates_are_complete() -> None:
    for name, protocol in protocols().items():
        if protocol.templates:
            assert protocol.classes, name
            assert (CLASSES / f"{protocol.classes}.txt").is_file()
    lines = lines_of(CLASSES / "imagenet.txt")
    assert len({line.split("\t")[0] for line in lines}) == len(lines) == 1000
    assert lines == sorted(lines), "folders and class numbers have the same order"
    templates = templates_of(Task("x", protocols()["imagenet"], None, "imagenet", False))  # type: ignore[arg-type]
    assert len(set(templates)) == 80
    assert all(template.count("{}") == 1 for template in templates)
