"""The benchmark as users run it: every kind of task and of model, reports, comparisons, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from longclip.checkpoint import load_checkpoint
from longclip.encode import encode_image, encode_text
from longclip.errors import DataError
from longclip.evaluation.metrics import classification_ranks, retrieval_figures, retrieval_ranks
from longclip.text.perturbations import CHANGES, KINDS, hard_negative
from longclip.text.sentences import split_sentences
from longclip.tokenizer import tokenize
from longclip.zero_shot import class_embeddings
from pipelines import benchmark
from pipelines.evaluation import measured
from pipelines.evaluation import tasks as protocols
from pipelines.evaluation.report import render_html, render_markdown
from tests.support.pictures import picture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROWS = 12
START, END = "A picture numbered {row} stands here. It holds colour {n} of many. ", "So it goes on. " * 20
TAIL = "A small red cup stands below the large blue door."
CAPTIONS = [[START.format(row=row, n=n) + END + TAIL * (not n) for n in range(1 + row % 3)] for row in range(ROWS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with one to three captions, and a class."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    images = [picture(row) for row in range(ROWS)]
    names = ["cat", "dog", "frog"]
    labels = [names[row % 3] for row in range(ROWS)]
    ids = [f"row-{row:02d}" for row in range(ROWS)]
    pq.write_table(pa.table({"id": ids, "image": images, "captions": CAPTIONS, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def results(data: Path, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one benchmark of two models, which are the same, on both kinds of task."""
    output = tmp_path_factory.mktemp("results") / "bench"
    run(
        output,
        models={"first": tiny_checkpoint_dir, "second": tiny_checkpoint_dir},
        tasks={
            "captions": {"input": str(data)},
            "animals": {"input": str(data), "kind": "zero_shot", "source": {"label": "label"}},
        },
    )
    return output


def run(output: Path, **settings: Any) -> None:
    arguments = [f"output={output}", f"cache={output.parent}/cache"]
    arguments += [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items()]
    benchmark.main([part for argument in arguments for part in ("--set", argument)])


def embedded(directory: Path, texts: Callable[[str, str], str], limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and texts after a change, embedded plainly."""
    checkpoint = load_checkpoint(directory)
    pixels = torch.from_numpy(np.stack([checkpoint.transform.pixels(picture(row)) for row in range(ROWS)]))
    changed = [texts(text, f"row-{row:02d}#{n}") for row, cell in enumerate(CAPTIONS) for n, text in enumerate(cell)]
    with torch.inference_mode():
        images = encode_image(checkpoint.model, checkpoint.transform.normalize(pixels))
        features = encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, changed, limit))
    return normalize(images, dim=1), normalize(features, dim=1)


IMAGE_OF_TEXT = torch.repeat_interleave(torch.tensor([len(cell) for cell in CAPTIONS]))


def test_figures_equal_a_direct_computation(results: Path, tiny_checkpoint_dir: Path) -> None:
    plain = retrieval_figures(retrieval_ranks(*embedded(tiny_checkpoint_dir, lambda text, _: text, 248), IMAGE_OF_TEXT))
    flat = json.loads((results / "results.json").read_text())["results"]["first"]
    assert {name: value for name, value in flat.items() if name.startswith("captions/") and "himo" not in name} == {
        f"captions/{name}": pytest.approx(value) for name, value in plain.items()
    }
    result = json.loads((results / "captions.json").read_text())
    found = result["models"]["first"]
    assert (result["protocol"], found["texts"], found["texts_cut"]) == ("own data: 12 images", len(IMAGE_OF_TEXT), 0)
    first = found["directions"]["image_to_text"]["recall@5"]
    assert first["low"] <= first["value"] <= first["high"]
    ranks = pq.read_table(results / "ranks" / "captions.first.parquet").to_pylist()
    hits = [row["rank"] < 5 for row in ranks if row["direction"] == "image_to_text"]
    assert sum(hits) / len(hits) == first["value"]
    assert [row["query"] for row in ranks][:3] == ["row-00#0", "row-01#0", "row-01#1"]


def test_identical_models_do_not_differ(results: Path) -> None:
    for name in ("captions", "animals"):
        result = json.loads((results / f"{name}.json").read_text())
        assert result["models"]["first"] == result["models"]["second"]
        for line in result["comparisons"]:
            assert (line["base"], line["model"], line["difference"], line["p_value"]) == ("first", "second", 0, 1)


def test_zero_shot_equals_the_library(results: Path, tiny_checkpoint_dir: Path) -> None:
    images, _ = embedded(tiny_checkpoint_dir, lambda text, _: text, 248)
    classes = class_embeddings(load_checkpoint(tiny_checkpoint_dir), ["cat", "dog", "frog"], ["a photo of a {}."])
    expected = classification_ranks(images, classes, torch.arange(ROWS) % 3)
    figures = json.loads((results / "animals.json").read_text())["models"]["first"]["directions"]["image_to_class"]
    assert figures["recall@1"]["value"] == expected.recall(1)
    assert figures["candidates"] == 3


def test_effective_length_figures(results: Path, tiny_checkpoint_dir: Path) -> None:
    study = json.loads((results / "captions.json").read_text())["models"]["first"]["long_text"]["text_to_image"]
    assert [point["tokens"] for point in study["recall@1"]] == [10, 20, 40, 77, 128, 248]
    for place, cut in ((0, 10), (2, 40)):
        ranks = retrieval_ranks(*embedded(tiny_checkpoint_dir, lambda text, _: text, cut), IMAGE_OF_TEXT)
        assert study["recall@1"][place]["value"] == pytest.approx(ranks["text_to_image"].recall(1))
    assert study["effective_length"] is None
    assert study["effective_length_reason"].startswith(f"not resolved with {len(IMAGE_OF_TEXT)} queries: ")
    assert f"not resolved with {len(IMAGE_OF_TEXT)} queries |" in (results / "report.md").read_text()


@pytest.mark.parametrize("name", CHANGES)
def test_perturbed_texts_equal_a_direct_computation(results: Path, tiny_checkpoint_dir: Path, name: str) -> None:
    study = json.loads((results / "captions.json").read_text())["models"]["first"]["long_text"]["text_to_image"]
    change = CHANGES[name]
    recalls = []
    for suffix in ["", *(f"/{draw}" for draw in range(1, 5) if change.is_random)]:

        def perturbed(text: str, key: str, suffix: str = suffix) -> str:
            return change.apply(text, key + suffix) or text

        ranks = retrieval_ranks(*embedded(tiny_checkpoint_dir, perturbed, 248), IMAGE_OF_TEXT)
        recalls.append(ranks["text_to_image"].recall(1))
    found = study["changes"][name]
    assert found["draws"] == len(recalls)
    assert found["recall@1"] == pytest.approx(np.mean(recalls))
    assert found["difference"] == pytest.approx(np.mean(recalls) - study["recall@1"][-1]["value"])
    assert found["texts_unchanged"] == 0
    assert len(split_sentences(CAPTIONS[0][0])) > 10


def test_growth_of_similarity_with_the_text(results: Path, tiny_checkpoint_dir: Path) -> None:
    found = json.loads((results / "captions.json").read_text())["models"]["first"]["scores"]
    images, whole = embedded(tiny_checkpoint_dir, lambda text, _: text, 248)

    def half(text: str, key: str) -> str:
        sentences = split_sentences(text)
        return "".join(sentences[: len(sentences) // 2])

    _, halves = embedded(tiny_checkpoint_dir, half, 248)
    growth = ((whole - halves) * images[IMAGE_OF_TEXT]).sum(1)
    assert found["himo@2"]["value"] == pytest.approx((growth > 1e-6).double().mean().item())
    assert found["himo@2"]["queries"] == len(IMAGE_OF_TEXT)
    assert found["himo@3"]["value"] <= 1


def test_wrong_attributes_behind_token_77(results: Path, tiny_checkpoint_dir: Path) -> None:
    found = json.loads((results / "captions.json").read_text())["models"]["first"]["hard_negatives"]
    images, texts = embedded(tiny_checkpoint_dir, lambda text, _: text, 248)
    tokenizer = load_checkpoint(tiny_checkpoint_dir).tokenizer
    for kind in KINDS:

        def negative(text: str, key: str, kind: str = kind) -> str:
            return hard_negative(kind, text, key, tokenizer) or text

        _, negatives = embedded(tiny_checkpoint_dir, negative, 248)
        with_tail = torch.tensor([text.endswith(TAIL) for cell in CAPTIONS for text in cell])
        margins = ((texts - negatives) * images[IMAGE_OF_TEXT]).sum(1)[with_tail]
        figures = found[kind]
        assert (figures["pairs"], figures["texts"], figures["equal"]) == (ROWS, len(IMAGE_OF_TEXT), 0)
        assert figures["right"] == int((margins > 0).sum()) == round(figures["value"] * ROWS)
        assert figures["low"] <= figures["value"] <= figures["high"]
    assert "| first | two exchanged |" in (results / "report.md").read_text()


def test_equal_scores_do_not_count_as_right() -> None:
    margins = np.array([0.3, 1e-9, -1e-9, 0.0, -0.2])  # the same tokens, in another batch
    figures = measured.Choices(margins, np.arange(5), 7).figures()
    assert {name: figures[name] for name in ("value", "right", "equal", "pairs", "texts")} == {
        "value": 0.2, "right": 1, "equal": 3, "pairs": 5, "texts": 7
    }  # fmt: skip


def test_reports_name_the_compared_models(results: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (results / name).read_text()
        assert "captions: own data: 12 images" in text
        assert "Candidates: 12 text to image, 24 image to text." in text
        assert "first reads 248 tokens" in text
    html = (results / "report.html").read_text()
    assert html.count("<polyline") == 4
    assert "<script" not in html


def test_reports_escape_user_input(results: Path) -> None:
    result = json.loads((results / "captions.json").read_text())
    result["models"] = {"<b>|x": result["models"]["first"]}
    assert "<b>" not in render_html("x", [result])
    assert "<b>\\|x" in render_markdown("x", [result])


def test_incomplete_protocol_data_is_rejected(
    tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in range(4):
        for name, content in (("image", picture(row)), ("caption", f"text {row}".encode())):
            file = tmp_path / "urban" / name / f"{row}.{'png' if name == 'image' else 'txt'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    models = {"tuned": tiny_checkpoint_dir}
    task = {"input": str(tmp_path / "urban")}
    with pytest.raises(DataError, match="has 4 of the 1000 images of urban1k"):
        run(tmp_path / "bench", models=models, tasks={"urban1k": task})
    assert not (tmp_path / "bench").exists()
    paper_figures = {"tuned": "long-clip-b16"}
    run(tmp_path / "bench", models=models, tasks={"urban1k": task | {"subset": True}}, paper_figures=paper_figures)
    assert json.loads((tmp_path / "bench" / "urban1k.json").read_text())["paper_figures"] == []
    assert "NOT urban1k: only 4 of the 1000 images" in (tmp_path / "bench" / "report.md").read_text()
    whole = protocols.protocols() | {
        "urban1k": protocols.protocols()["urban1k"].model_copy(update={"expected_images": 4, "expected_texts": 4})
    }
    monkeypatch.setattr(protocols, "protocols", lambda: whole)
    run(tmp_path / "bench", models=models, tasks={"urban1k": task}, paper_figures=paper_figures)
    line, _ = json.loads((tmp_path / "bench" / "urban1k.json").read_text())["paper_figures"]
    assert (line["direction"], line["paper"], line["reproduced"]) == ("text_to_image", 79.6, False)
    assert line["difference"] == pytest.approx(line["measured"] - 79.6)
    assert "not reproduced" in (tmp_path / "bench" / "report.md").read_text()


def test_official_weights_are_converted_once(tmp_path: Path, data: Path, vectors: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    shutil.copy(vectors / "openai_tiny_clip.safetensors", weights)
    run(tmp_path / "bench", models={"official": weights}, tasks={"captions": {"input": str(data)}}, long_text=False)
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    figures = json.loads((tmp_path / "bench" / "captions.json").read_text())["models"]["official"]
    assert figures["context_length"] == load_checkpoint(converted).context_length
    assert "long_text" not in figures


def test_duplicate_ids_are_rejected(tmp_path: Path, tiny_checkpoint_dir: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "a"], "image": [picture(0)] * 3, "caption": ["x", "y", "z"]}), path)
    with pytest.raises(DataError, match="id 'a' occurs more than once"):
        run(tmp_path / "bench", models={"m": tiny_checkpoint_dir}, tasks={"mine": {"input": str(path)}})


def test_models_with_different_queries_are_not_compared(results: Path) -> None:
    ranks = retrieval_ranks(torch.eye(2), torch.eye(2), torch.arange(2))["text_to_image"]
    answers = [measured.Answers(ranks, queries, np.arange(2)) for queries in (("a#0", "b#0"), ("a#0", "c#0"))]
    a, b = (measured.Measured("x", 77, 2, 2, 0, {measured.WHOLE: {"text_to_image": answer}}, {}) for answer in answers)
    with pytest.raises(DataError, match=r"2 queries were given to one model only, e\.g\. 'b#0'"):
        measured.compare(a, b, "text_to_image")
    assert measured.compare(a, a, "text_to_image").difference == 0
