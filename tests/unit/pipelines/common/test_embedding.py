"""Embedding rows: CPU tasks decode and tokenize, actors only encode, and no text is encoded that is not kept."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from longclip import images
from longclip.checkpoint import Checkpoint
from longclip.images import decode_image
from longclip.text.perturbations import CHANGES
from longclip.tokenizer import TokenBatch
from pipelines.common import embedding
from pipelines.common.columns import Columns
from pipelines.common.embedding import EmbeddingInputs, EmbedRows, Reading, object_column
from pipelines.common.workers import Workers
from pipelines.indexing.corpus import Corpus
from pipelines.indexing.table import table_schema
from tests.support.pictures import picture
from tests.support.rows import Refused
from tests.support.scenes_index import library_image_embedding, library_text_embedding

CAPTIONS = [
    [f"Picture {row} has a red dot.", *(f"Caption {n} of picture {row}." for n in range(4))] for row in range(4)
]


@pytest.fixture
def quarantine(monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Refused()


def batch(captions: list[Any], pictures: list[bytes] | None = None) -> dict[str, np.ndarray]:
    return {
        "id": object_column([f"row-{row}" for row in range(len(captions))]),
        "image": object_column(pictures or [picture(row) for row in range(len(captions))]),
        "caption": object_column(captions),
    }


def embed(
    rows: dict[str, np.ndarray],
    readings: dict[str, Reading],
    checkpoint: Checkpoint,
    directory: Path,
    quarantine: Refused,
    thumbnail_side: int | None = None,
) -> dict[str, Any]:
    inputs = EmbeddingInputs(
        Columns(), checkpoint.transform, str(directory), 248, quarantine, readings, ["id"], thumbnail_side
    )
    keep = ["id", *(f"{name}_cut" for name in readings), *(["thumbnail"] if thumbnail_side else [])]
    keep += [f"{name}_unchanged" for name, reading in readings.items() if reading.change]
    return EmbedRows(str(directory), list(readings), keep)(inputs(rows))


def test_an_index_encodes_only_the_captions_that_it_keeps(
    tiny_checkpoint: Checkpoint,
    tiny_checkpoint_dir: Path,
    quarantine: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[int] = []

    def counting(model: Any, tokens: TokenBatch) -> Any:
        encoded.append(len(tokens))
        return encode_text(model, tokens)

    encode_text = embedding.encode_text
    monkeypatch.setattr(embedding, "encode_text", counting)
    schema = table_schema(24, True, [], pa.schema([]))
    corpus = Corpus(None, Columns(), schema, tiny_checkpoint, str(tiny_checkpoint_dir), "", Workers())  # type: ignore[arg-type]
    rows = embed(batch(CAPTIONS), corpus.readings, tiny_checkpoint, tiny_checkpoint_dir, quarantine)
    assert sum(encoded) == 4, "20 captions, of which the first of each row is kept"
    expected = library_text_embedding(tiny_checkpoint, *(captions[0] for captions in CAPTIONS))
    np.testing.assert_allclose(np.concatenate(rows["caption_embedding"]), expected, atol=1e-6)
    images_expected = library_image_embedding(tiny_checkpoint, *(picture(row) for row in range(4)))
    np.testing.assert_allclose(rows["image_embedding"], images_expected, atol=1e-6)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(40, 36), (400, 300)])
def test_pixels_and_thumbnail_come_from_one_decoding(
    tiny_checkpoint: Checkpoint,
    quarantine: Refused,
    monkeypatch: pytest.MonkeyPatch,
    image_format: str,
    size: tuple[int, int],
) -> None:
    pictures = [picture(row, size, image_format) for row in range(3)]
    decoded: list[int] = []

    def counting(data: bytes, *arguments: Any) -> Any:
        decoded.append(len(data))
        return decode(data, *arguments)

    decode = images._decode
    monkeypatch.setattr(images, "_decode", counting)
    inputs = EmbeddingInputs(Columns(), tiny_checkpoint.transform, "", 248, quarantine, {}, ["id"], 256)
    rows = inputs(batch(["", "", ""], pictures))
    assert len(decoded) == 3
    for row, data in enumerate(pictures):
        np.testing.assert_array_equal(rows["pixels"][row], tiny_checkpoint.transform.pixels(data))
        whole = decode_image(data)
        whole.thumbnail((256, 256))
        out = io.BytesIO()
        whole.save(out, "JPEG", quality=90)
        assert rows["thumbnail"][row] == out.getvalue()


def test_lists_of_texts_are_cut_and_changed_as_their_reading_says(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, quarantine: Refused
) -> None:
    long = "One long sentence. " * 40
    captions = ["A single text.", ["First. Second. Third.", long], np.array(["x", "y", "z"], dtype=object)]
    readings = {
        "whole": Reading("caption"),
        "cut": Reading("caption", context_length=10),
        "changed": Reading("caption", change="sentences_shuffled"),
        "another": Reading("caption", change="sentences_shuffled", draw=1),
    }
    rows = embed(batch(captions), readings, tiny_checkpoint, tiny_checkpoint_dir, quarantine)
    cells = [[text] if isinstance(text, str) else list(text) for text in captions]
    assert [len(cell) for cell in rows["whole_embedding"]] == [1, 2, 3]
    assert rows["whole_cut"].tolist() == [0, 0, 0]
    assert rows["cut_cut"].tolist() == [0, 1, 0]
    assert rows["changed_unchanged"].tolist() == [1, 0, 3], "single sentences"
    change = CHANGES["sentences_shuffled"].apply
    for row, cell in enumerate(cells):
        np.testing.assert_allclose(
            rows["whole_embedding"][row], library_text_embedding(tiny_checkpoint, *cell), atol=1e-6
        )
        for name, suffix in (("changed", ""), ("another", "/1")):
            changed = [change(text, f"row-{row}#{number}{suffix}") or text for number, text in enumerate(cell)]
            np.testing.assert_allclose(
                rows[f"{name}_embedding"][row], library_text_embedding(tiny_checkpoint, *changed), atol=1e-6
            )


def test_equal_texts_of_all_readings_are_encoded_once(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, quarantine: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode_text = embedding.encode_text

    def counting(model: Any, tokens: TokenBatch) -> Any:
        encoded.append(len(tokens))
        return encode_text(model, tokens)

    monkeypatch.setattr(embedding, "encode_text", counting)
    readings = {
        "whole": Reading("caption"),
        "cut": Reading("caption", context_length=20),  # cuts only the last text
        "dropped": Reading("caption", change="first_sentence_dropped"),  # applies to the second one
    }
    captions = ["One sentence.", "A first. A second.", ["One sentence.", "word " * 30]]
    rows = embed(batch(captions), readings, tiny_checkpoint, tiny_checkpoint_dir, quarantine)
    assert encoded == [3 + 1 + 1]
    np.testing.assert_array_equal(rows["whole_embedding"][0], rows["cut_embedding"][2][:1])
    expected = library_text_embedding(tiny_checkpoint, "A second.")
    np.testing.assert_allclose(rows["dropped_embedding"][1], expected, atol=1e-6)


def test_rows_without_text_or_image_are_rejected_in_the_cpu_tasks(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, quarantine: Refused
) -> None:
    rows = batch(["a", " ", ["b", ""], None], [picture(0), picture(1), b"not an image", picture(3)])
    embedded = embed(rows, {"caption": Reading("caption")}, tiny_checkpoint, tiny_checkpoint_dir, quarantine)
    assert list(embedded["id"]) == ["row-0"]
    assert quarantine.reasons.keys() == {"row-1", "row-2", "row-3"}
    assert quarantine.reasons["row-1"] == quarantine.reasons["row-3"] == "column 'caption' has no text"
    assert "cannot be decoded" in quarantine.reasons["row-2"]


def test_a_batch_without_usable_rows_has_the_same_columns(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, quarantine: Refused
) -> None:
    embedded = embed(batch([None]), {"caption": Reading("caption")}, tiny_checkpoint, tiny_checkpoint_dir, quarantine)
    assert embedded["image_embedding"].shape == (0, 24)
    assert len(embedded["id"]) == len(embedded["caption_cut"]) == 0
