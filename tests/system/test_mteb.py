"""The documented lines for mteb, with its own task on local rows: its recall equals ours."""

import io
import re
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
import torch
from mteb.tasks.retrieval.eng.flickr30k_i2t_retrieval import Flickr30kI2TRetrieval
from PIL import Image

from longclip.checkpoint import Checkpoint
from longclip.encode import encode_image, encode_text, unit
from longclip.evaluation.metrics import retrieval_figures, retrieval_ranks
from longclip.export import export_checkpoint
from longclip.tokenizer import tokenize
from tests.support.pictures import picture
from tests.support.places import ROOT

ROWS = 16
BEFORE = " ".join(f"Thing number {number} is next to a small red cup." for number in range(12))
TEXTS = [f"{BEFORE} In picture {row} there are {row} dots." for row in range(ROWS)]  # they differ after token 77


class LocalTask(Flickr30kI2TRetrieval):
    """mteb's task without its download."""

    def load_data(self, *_: Any, **__: Any) -> None:
        ids = [str(row) for row in range(ROWS)]
        images = [Image.open(io.BytesIO(picture(row))).convert("RGB") for row in range(ROWS)]
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        self.dataset = {
            "default": {
                "test": {
                    "corpus": datasets.Dataset.from_dict({"id": [f"text-{key}" for key in ids], "text": TEXTS}),
                    "queries": datasets.Dataset.from_dict({"id": ids, "image": images}, features=features),
                    "relevant_docs": {key: {f"text-{key}": 1} for key in ids},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


def test_recall_in_mteb_is_ours(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mteb, "get_tasks", lambda **_: [LocalTask()])
    export_checkpoint(tiny_checkpoint, "sentence-transformers", tmp_path / "exported" / "sentence-transformers")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(import mteb\n.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    (scores,) = names["results"].task_results[0].scores["test"]

    assert tokenize(tiny_checkpoint.tokenizer, TEXTS).lengths.min() > 77
    transform = tiny_checkpoint.transform
    pixels = torch.from_numpy(np.stack([transform.pixels(picture(row)) for row in range(ROWS)]))
    with torch.inference_mode():
        images = unit(encode_image(tiny_checkpoint.model, transform.normalize(pixels)))
        texts = unit(encode_text(tiny_checkpoint.model, tokenize(tiny_checkpoint.tokenizer, TEXTS)))
    ours = retrieval_figures(retrieval_ranks(images, texts, torch.arange(ROWS)))
    for k in (1, 5, 10):
        assert scores[f"recall_at_{k}"] == pytest.approx(ours[f"image_to_text/recall@{k}"], abs=1e-4)
