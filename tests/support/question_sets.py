"""Small sets of questions in their true layouts."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.broken_rows import jpeg

PIXELS = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
"""Of the image of FG-OVD's boxes."""


def write(path: Path, content: bytes | str | Any) -> Path:
    """Write a file and return its path; what is neither bytes nor text becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*entries: dict[str, Any]) -> str:
    """JSON objects, one in each line."""
    return "\n".join(map(json.dumps, entries)) + "\n"


def sugarcrepe(root: Path) -> None:
    """Two images with a question each in every subset."""
    for number in (1, 2):
        write(root / "val2017" / f"{number:012d}.jpg", jpeg(number))
    for subset in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        entries = {
            "0": {"filename": "000000000001.jpg", "caption": "a dog", "negative_caption": f"a cat {subset}"},
            "2": {"filename": "000000000002.jpg", "caption": "a cup", "negative_caption": f"a can {subset}"},
        }
        write(root / f"{subset}.json", entries)


def box(number: int, wrong: int = 10) -> dict[str, Any]:
    """A line of FG-OVD's file."""
    return {
        "img_path": "val2017/1.png",
        "bbox": [2.7, 3.2, 4.0, 2.0],
        "pos_expression": [f"a red cup {number}"],
        "neg_expression": [f"a cup {number}.{n}" for n in range(wrong)],
    }


def fg_ovd(root: Path) -> None:
    """Two boxes of one image."""
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "PNG")
    write(root / "coco" / "val2017" / "1.png", out.getvalue())
    write(root / "1_attributes_llava.jsonl", lines(box(1), box(2)))


def winoground(root: Path) -> None:
    """Four examples."""
    entries = []
    for key in range(4):
        for side in (0, 1):
            write(root / "images" / f"ex_{key}_img_{side}.png", jpeg(2 * key + side))
        names = {f"image_{side}": f"ex_{key}_img_{side}" for side in (0, 1)}
        entries.append({"id": key, **names, "caption_0": f"some plants {key}", "caption_1": f"a lightbulb {key}"})
    write(root / "examples.jsonl", lines(*entries))


def mmvp_vlm(root: Path) -> None:
    """Two pairs of different types."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["Question ID", "Type", "Statement"])
    for number, (kind, statement) in enumerate(
        [("Quantity and Count", "one cup"), ("Quantity and Count", "two cups"), ("Texts", "a, b"), ("Texts", "c")], 1
    ):
        table.writerow([number, kind, statement])
        write(root / "MLLM_VLM Images" / kind / f"{number}.jpg", jpeg(number))
    write(root / "Questions.csv", out.getvalue())


def himo_docci(root: Path) -> None:
    """Two images, with three and two captions."""
    write(root / "images" / "test_00000.jpg", jpeg(0))
    write(root / "images" / "test_00001.jpg", jpeg(1))
    captions = ["A cup.", "A cup. Red.", "A cup. Red. Full."]
    rows = [{"img_path": f"test_0000{n}.jpg", "caption": captions[: 3 - n], "raw_caption": "x"} for n in (0, 1)]
    write(root / "himo_docci_data.json", lines(*rows))


SETS: dict[str, Callable[[Path], None]] = {
    "sugarcrepe": sugarcrepe,
    "fg-ovd-hard": fg_ovd,
    "winoground": winoground,
    "mmvp-vlm": mmvp_vlm,
    "himo-docci": himo_docci,
}
