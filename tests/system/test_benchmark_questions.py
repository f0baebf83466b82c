"""Sets of questions through the benchmark: scores, comparisons and reports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from longclip.checkpoint import load_checkpoint
from longclip.encode import encode_image, encode_text
from longclip.tokenizer import tokenize
from pipelines import benchmark
from tests.support.broken_rows import jpeg
from tests.support.question_sets import sugarcrepe, winoground

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def run(output: Path, model: Path, tasks: dict[str, Any]) -> None:
    arguments = [f"output={output}", f"cache={output.parent}/cache", f"tasks={json.dumps(tasks)}"]
    arguments.append(f"models={json.dumps({'first': str(model), 'second': str(model)})}")
    benchmark.main([part for argument in arguments for part in ("--set", argument)])


def similarities(directory: Path, images: Sequence[bytes], texts: Sequence[str]) -> np.ndarray:
    """`[images, texts]`, computed plainly."""
    checkpoint = load_checkpoint(directory)
    pixels = torch.from_numpy(np.stack([checkpoint.transform.pixels(image) for image in images]))
    with torch.inference_mode():
        of_images = encode_image(checkpoint.model, checkpoint.transform.normalize(pixels))
        of_texts = encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, list(texts), 248))
    return (normalize(of_images, dim=1) @ normalize(of_texts, dim=1).T).numpy()


def test_scores_equal_a_direct_computation(tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    sugarcrepe(tmp_path / "crepe")
    winoground(tmp_path / "winoground")
    tasks = {
        "sugarcrepe": {"input": str(tmp_path / "crepe"), "subset": True},
        "pairs": {"input": str(tmp_path / "winoground"), "protocol": "winoground", "subset": True},
    }
    run(tmp_path / "bench", tiny_checkpoint_dir, tasks)
    texts = ["a dog", "a cup", "a cat add_att", "a can add_att"]
    scores = similarities(tiny_checkpoint_dir, [jpeg(1), jpeg(2)], texts)
    right = [scores[0, 0] > scores[0, 2], scores[1, 1] > scores[1, 3]]
    result = json.loads((tmp_path / "bench" / "sugarcrepe.json").read_text())
    assert result["protocol"] == "NOT sugarcrepe: only 14 of the 7511 questions (all) of sugarcrepe"
    figures = result["models"]["first"]["scores"]
    assert (figures["add_att"]["value"], figures["add_att"]["queries"]) == (np.mean(right), 2)
    assert figures["all"]["low"] <= figures["all"]["value"] <= figures["all"]["high"]
    (line,) = result["comparisons"]
    assert (line["direction"], line["figure"], line["difference"], line["queries"]) == ("all", "score", 0, 14)
    grid = [
        similarities(tiny_checkpoint_dir, [jpeg(2 * n), jpeg(2 * n + 1)], [f"some plants {n}", f"a lightbulb {n}"])
        for n in range(4)
    ]
    expected = np.mean([grid[0, 0] > grid[0, 1] and grid[1, 1] > grid[1, 0] for grid in grid])
    flat = json.loads((tmp_path / "bench" / "results.json").read_text())["results"]["second"]
    assert flat["pairs/text"] == expected
    assert {"pairs/image", "pairs/group", "sugarcrepe/swap_obj"} <= flat.keys()
    rows = pq.read_table(tmp_path / "bench" / "scores" / "sugarcrepe.first.parquet").to_pylist()
    assert sum(row["score"] == "all" for row in rows) == 14
    for name in ("report.md", "report.html"):
        report = (tmp_path / "bench" / name).read_text()
        assert "all questions" in report
        assert "NOT winoground: only 8 of the 800 images of winoground" in report
