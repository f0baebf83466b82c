"""Sets of questions in their true layouts, with few entries: read, scored by hand, and refused when they are wrong."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.storage import Storage
from pipelines.data.sources.source import SourceRow
from pipelines.evaluation.questions import eccv_caption
from pipelines.evaluation.questions.rows import Embedded
from pipelines.evaluation.scores import Score
from pipelines.evaluation.settings import TaskSettings
from pipelines.evaluation.tasks import Task, open_task, protocols
from tests.support.broken_rows import jpeg
from tests.support.question_sets import (
    PIXELS,
    SETS,
    box,
    fg_ovd,
    himo_docci,
    lines,
    mmvp_vlm,
    sugarcrepe,
    winoground,
    write,
)


def opened(name: str, data: Path, **settings: Any) -> Task:
    return open_task(name, TaskSettings(input=str(data), **settings), Storage())


def rows_of(task: Task) -> list[SourceRow]:
    return [row for piece in task.source.pieces(UPath("/")) for row in task.source.read(piece)]


def scored(task: Task, similarities: dict[str, list[float]]) -> dict[str, Score]:
    """Scores where texts have these similarities with the image of their row."""
    assert task.questions is not None
    embedded = {}
    for row in task.questions.rows:
        if row.id in similarities:
            values = np.array(similarities[row.id])
            embedded[row.id] = Embedded(np.array([1.0, 0.0]), np.stack([values, np.sqrt(1 - values**2)], axis=1))
    return task.questions.scores(embedded)


def means(scores: dict[str, Score]) -> dict[str, float]:
    return {name: round(float(score.values.mean()), 4) for name, score in scores.items()}


def test_sugarcrepe(tmp_path: Path) -> None:
    sugarcrepe(tmp_path)
    task = opened("sugarcrepe", tmp_path)
    first, second = rows_of(task)
    assert (first.image, second.image) == (jpeg(1), jpeg(2))
    assert (first.captions[:2], len(first.captions)) == (["a dog", "a cat add_att"], 8)  # equal texts once
    # Image 1: the right caption is closer than each wrong one. Image 2: it is not, and once it is as close.
    ids = first.id, second.id
    scores = scored(task, {ids[0]: [0.5] + [0.4] * 7, ids[1]: [0.3, 0.3, *[0.4] * 6]})
    assert means(scores) == dict.fromkeys(protocols()["sugarcrepe"].expected_questions, 0.5)
    assert scores["all"].queries[:2] == ("add_att/0", "add_att/2")
    assert scores["all"].groups.tolist() == [0, 1] * 7
    assert [score.is_main for score in scores.values()] == [True] + [False] * 7
    assert {score.chance for score in scores.values()} == {0.5}
    # Rows that cannot be used are left out, and then the counts are not the protocol's.
    part = scored(task, {ids[0]: [0.5] + [0.4] * 7})
    assert len(part["all"].values) == 7
    counts = {name: len(score.values) for name, score in part.items()}
    with pytest.raises(DataError, match=r"has 7 of the 7511 questions \(all\) of sugarcrepe"):
        task.check_counts(1, 8, counts)
    assert task.check_counts(2, 16, protocols()["sugarcrepe"].expected_questions) == "sugarcrepe"


def test_sugarcrepe_pp(tmp_path: Path) -> None:
    write(tmp_path / "val2017" / "1.jpg", jpeg(1))
    for subset in ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        entry = {"id": 0, "filename": "1.jpg", "caption": "a dog", "caption2": "one dog", "negative_caption": "a cat"}
        write(tmp_path / "data" / f"{subset}.json", [entry | {"negative_caption": f"a cat {subset}"}])
    task = opened("sugarcrepe-pp", tmp_path)
    (row,) = rows_of(task)
    assert row.captions[:3] == ["a dog", "one dog", "a cat replace_att"]
    # One right caption is closer than all wrong ones, the other one than three of them.
    scores = scored(task, {row.id: [0.9, 0.5, 0.4, 0.6, 0.3, 0.4999, 0.5]})
    assert means(scores)["all"] == 0.6
    assert means(scores)["replace_obj"] == 0.0
    assert scores["all"].chance == pytest.approx(1 / 3)
    # Alone, the right texts must be closer to each other than each of them to the wrong one. By angle from the image:
    # 25.8 and 60 degrees, so 34.2 apart; the wrong ones are 6.4 (66.4), 6.9, 12.5, 0 and 0 degrees from the second.
    assert means(scores)["text_only"] == 0.0
    assert means(scored(task, {row.id: [0.9, 0.89, 0.1, 0.9, 0.2, 0.3, 0.4]}))["text_only"] == 0.8


def test_fg_ovd_cuts_out_the_box(tmp_path: Path) -> None:
    fg_ovd(tmp_path)
    task = opened("fg-ovd-hard", tmp_path)
    first, second = rows_of(task)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first.image))), PIXELS[3:5, 2:6])
    assert first.captions == ["a red cup 1", *[f"a cup 1.{n}" for n in range(10)]]
    scores = scored(task, {first.id: [0.5] + [0.4] * 10, second.id: [0.5] + [0.4] * 9 + [0.5]})
    assert means(scores) == {"all": 0.5}
    assert scores["all"].chance == pytest.approx(1 / 11)
    assert scores["all"].groups.tolist() == [0, 0]  # two boxes of one image
    assert task.check_counts(2, 22, {"all": 2}) == "fg-ovd-hard: 2 images, a number that is not checked"
    for wrong, reason in (([2, 3, 9, 2], "is not within the image of 10 x 8 pixels"), ([-1, 0, 2, 2], "is not within")):
        write(tmp_path / "1_attributes_llava.jsonl", lines(box(1) | {"bbox": wrong}))
        (row,) = rows_of(opened("fg-ovd-hard", tmp_path))
        assert reason in str(row.problem)
    write(tmp_path / "1_attributes_llava.jsonl", lines(box(1) | {"bbox": [2, 3, 0.2, 0.2]}))
    (row,) = rows_of(opened("fg-ovd-hard", tmp_path))
    assert Image.open(io.BytesIO(row.image)).size == (1, 1)


def at(degrees: float) -> np.ndarray:
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def test_winoground(tmp_path: Path) -> None:
    winoground(tmp_path)
    task = opened("winoground", tmp_path)
    rows = rows_of(task)
    assert [row.image for row in rows[:2]] == [jpeg(0), jpeg(1)]
    assert rows[1].captions == ["a lightbulb 0"]
    assert task.questions is not None
    # Angles of image 0, image 1, caption 0, caption 1.
    angles = {
        "000": (0, 90, 10, 80),  # all right
        "001": (0, 10, -20, 90),  # image 1 prefers caption 0
        "002": (0, 90, 40, 41),  # caption 1 prefers image 0
        "003": (0, 90, 80, 10),  # all wrong
    }
    embedded = {}
    for key, (image_0, image_1, caption_0, caption_1) in angles.items():
        embedded[f"{key}/0"] = Embedded(at(image_0), at(caption_0)[None])
        embedded[f"{key}/1"] = Embedded(at(image_1), at(caption_1)[None])
    scores = task.questions.scores(embedded)
    assert {name: score.values.tolist() for name, score in scores.items()} == {
        "text": [1, 0, 1, 0],
        "image": [1, 1, 0, 0],
        "group": [1, 0, 0, 0],
    }
    assert [score.chance for score in scores.values()] == [0.25, 0.25, pytest.approx(1 / 6)]
    del embedded["002/1"]
    assert task.questions.scores(embedded)["group"].queries == ("000", "001", "003")


def test_mmvp_vlm(tmp_path: Path) -> None:
    mmvp_vlm(tmp_path)
    task = opened("mmvp-vlm", tmp_path)
    rows = rows_of(task)
    texts = ("one cup", "two cups", "a, b", "c")
    assert [row.captions for row in rows] == [[f"a photo of {text}"] for text in texts]
    assert [row.image for row in rows] == [jpeg(number) for number in range(1, 5)]
    assert task.questions is not None
    embedded = {
        row.id: Embedded(at(image), at(text)[None])
        # The texts of the first pair find their images, though image 2 is closer to text 1; the second pair's do not.
        for row, image, text in zip(rows, (0, 10, 0, 10), (-20, 90, 20, 90), strict=True)
    }
    scores = task.questions.scores(embedded)
    assert means(scores) == {"all": 0.5, "Quantity and Count": 1.0, "Texts": 0.0}


def test_himo_docci(tmp_path: Path) -> None:
    himo_docci(tmp_path)
    task = opened("himo-docci", tmp_path)
    first, second = rows_of(task)
    assert first.captions == ["A cup.", "A cup. Red.", "A cup. Red. Full."]
    scores = scored(task, {first.id: [0.1, 0.4, 0.3], second.id: [0.5, 0.2]})
    np.testing.assert_allclose(scores["himo@k"].values, [0.2 / math.sqrt(2 * 0.14 / 3), -1])
    figures = scores["himo@k"].figures()
    assert -1 <= figures["low"] <= figures["value"] <= figures["high"] <= 1
    assert means(scored(task, {first.id: [0.5, 0.5, 0.5], second.id: [0.1, 0.3]})) == {"himo@k": 0.5}


def eccv(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images with two captions each; image 7 also matches 21, and 99, which is not a candidate."""
    package = root / "package"
    write(package / "original_image_to_caption.json", {"7": [2, 1], "8": [11, 12], "9": [21, 22]})
    write(package / "eccv_image_to_caption.json", {"7": [1, 2, 21, 99], "9": [22]})
    write(package / "eccv_caption_to_image.json", {"11": [8, 9]})
    monkeypatch.setattr(eccv_caption, "matches_directory", lambda: package)
    images = [{"id": number, "file_name": f"COCO_val2014_{number}.jpg"} for number in (7, 8, 9, 10)]
    captions = [{"id": n, "image_id": n // 10 + 7, "caption": f"text {n}"} for n in (1, 2, 3, 11, 12, 21, 22)]
    write(root / "annotations" / "captions_val2014.json", {"images": images, "annotations": captions})
    for number in (7, 8, 9):
        write(root / "val2014" / f"COCO_val2014_{number}.jpg", jpeg(number))


def test_eccv_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eccv(tmp_path, monkeypatch)
    task = opened("eccv-caption", tmp_path)
    rows = rows_of(task)
    assert [row.captions for row in rows] == [["text 1", "text 2"], ["text 11", "text 12"], ["text 21", "text 22"]]
    assert [row.image for row in rows] == [jpeg(7), jpeg(8), jpeg(9)]
    assert task.questions is not None
    texts = {"7": (0, 30), "8": (20, 60), "9": (10, 80)}
    embedded = {
        row: Embedded(at(image), np.stack([at(angle) for angle in texts[row]]))
        for row, image in (("7", 0), ("8", 40), ("9", 75))
    }
    scores = task.questions.scores(embedded)
    # Image 7 ranks 1, 21, 11, 2: R is 4, of which the first two and the fourth are right. Image 9 ranks 22 first.
    # Caption 11, at 20 degrees, ranks image 7 or 8 (both at 20 degrees) first: the wrong one, and then a right one.
    assert {name: score.values.tolist() for name, score in scores.items()} == {
        "image_to_text/recall@1": [1, 1],
        "image_to_text/r-precision": [0.75, 1],
        "image_to_text/map@r": [pytest.approx((1 + 1 + 3 / 4) / 4), 1],
        "text_to_image/recall@1": [0],
        "text_to_image/r-precision": [0.5],
        "text_to_image/map@r": [0.25],
    }
    assert scores["text_to_image/map@r"].groups.tolist() == [1]


BOXES, TABLE = "1_attributes_llava.jsonl", "Question ID,Type,Statement\n"


@pytest.mark.parametrize(
    ("name", "file", "content", "problem"),
    [
        ("sugarcrepe", "swap_obj.json", None, "has no swap_obj.json; give the directory that has it"),
        ("sugarcrepe", "swap_obj.json", "{", "swap_obj.json' is not valid JSON"),
        ("sugarcrepe", "swap_obj.json", "3", "is not a list or an object of entries"),
        ("sugarcrepe", "add_att.json", '{"5": {"filename": "x"}}', "entry 5 of '.*add_att.json' has no text in 'neg"),
        ("sugarcrepe", "add_att.json", b"\xff", "is not valid utf-8"),
        ("sugarcrepe", "val2017", None, "has no val2017/ or images/; name it with --set .*source.images=<directory>"),
        ("fg-ovd-hard", BOXES, None, "has no 1_attributes_llava.jsonl or h_attributes_llava.jsonl"),
        ("fg-ovd-hard", BOXES, lines(box(1)) + "{", "is not valid JSON in line 2"),
        ("fg-ovd-hard", BOXES, "\n", "has annotations without any entry"),
        ("fg-ovd-hard", BOXES, lines(box(1) | {"bbox": [1, 2, 3]}), "entry 1 .* no box of four"),
        ("fg-ovd-hard", BOXES, lines(box(1) | {"pos_expression": ["a", "b"]}), "has 2 right captions"),
        ("fg-ovd-hard", BOXES, lines(box(1) | {"neg_expression": []}), "has no texts in 'neg_"),
        ("winoground", "examples.jsonl", lines({"id": "x"}), "entry 1 of '.*' has no number in 'id'"),
        ("mmvp-vlm", "Questions.csv", f"{TABLE}1,Texts,a\n", "is not followed by the other one"),
        ("mmvp-vlm", "Questions.csv", f"{TABLE}2,Texts,a\n3,Texts,b\n", "has number 2 and the next 3"),
        ("himo-docci", "himo_docci_data.json", lines({"img_path": "a", "caption": ["x", None]}), "no texts in 'capt"),
    ],
)
def test_what_is_wrong_is_named(
    name: str, file: str, content: str | bytes | None, problem: str, tmp_path: Path
) -> None:
    SETS[name](tmp_path)
    path = tmp_path / file
    if content is not None:
        write(path, content)
    elif path.is_dir():
        path.rename(tmp_path / "elsewhere")
    else:
        path.unlink()
    with pytest.raises(DataError, match=problem) as error:
        opened(name, tmp_path)
    assert str(error.value).startswith(f"tasks.{name}.input")
    assert "\n" not in str(error.value)


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    himo_docci(tmp_path)
    text = '{"img_path": "test_00000.jpg", "caption": ["a\u2028b", "a\u2028b\x85c"]}\r\n'
    write(tmp_path / "himo_docci_data.json", text.encode())
    (row,) = rows_of(opened("himo-docci", tmp_path))
    assert row.captions == ["a\u2028b", "a\u2028b\x85c"]


def test_a_file_instead_of_its_directory(tmp_path: Path) -> None:
    himo_docci(tmp_path)
    with pytest.raises(DataError, match=r"data\.json' has no himo_docci_data\.json; give the directory that has it"):
        opened("himo-docci", tmp_path / "himo_docci_data.json")


def test_images_elsewhere(tmp_path: Path) -> None:
    sugarcrepe(tmp_path / "set")
    (tmp_path / "set" / "val2017").rename(tmp_path / "coco")
    task = opened("sugarcrepe", tmp_path / "set", source={"images": str(tmp_path / "coco")})
    assert [row.image for row in rows_of(task)] == [jpeg(1), jpeg(2)]
    (tmp_path / "coco" / "000000000002.jpg").unlink()
    assert "does not exist" in str(rows_of(task)[1].problem)
    with pytest.raises(ConfigError, match=r"tasks\.sugarcrepe\.source\.caption does not apply to a set of questions"):
        opened("sugarcrepe", tmp_path / "set", source={"caption": "x"})


def test_eccv_caption_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eccv_caption, "PACKAGE", "not_installed_at_all")
    with pytest.raises(ConfigError, match=r"pip install 'longclip\[eccv\]'"):
        opened("eccv-caption", tmp_path)
