"""The model of a replica: embeddings, batching, cache, health check."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longclip.checkpoint import Checkpoint, load_checkpoint
from longclip.tokenizer import TokenBatch, tokenize
from serving import embedder as module
from serving.embedder import Embedder
from tests.support.pictures import picture
from tests.support.scenes_index import library_image_embedding, library_text_embedding, scene

pytestmark = pytest.mark.anyio

TEXTS = ["a dog", scene(3)[1], "two boats on a river at dusk", "a dog", scene(1)[1] * 9, "x"]


@pytest.fixture
def embedder(tiny_checkpoint: Checkpoint) -> Embedder:
    return Embedder(tiny_checkpoint, torch_threads=torch.get_num_threads())


@pytest.fixture
def read(tiny_checkpoint: Checkpoint) -> Callable[[list[str]], TokenBatch]:
    return lambda texts: tokenize(tiny_checkpoint.tokenizer, texts)


async def test_embeddings_equal_those_of_the_library(
    embedder: Embedder, tiny_checkpoint: Checkpoint, read: Callable[[list[str]], TokenBatch]
) -> None:
    images = [picture(seed) for seed in range(11)]
    pixels = np.stack([tiny_checkpoint.transform.pixels(image) for image in images])
    texts, pictures = await asyncio.gather(embedder.embed_texts(read(TEXTS)), embedder.embed_images(pixels))
    np.testing.assert_allclose(texts, library_text_embedding(tiny_checkpoint, *TEXTS), atol=1e-5)
    np.testing.assert_allclose(pictures, library_image_embedding(tiny_checkpoint, *images), atol=1e-5)
    assert texts.dtype == pictures.dtype == np.float32


async def test_bfloat16_embeddings_differ_only_by_rounding(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, read: Callable[[list[str]], TokenBatch]
) -> None:
    embedder = Embedder(load_checkpoint(tiny_checkpoint_dir), torch.get_num_threads(), "bfloat16")
    images = [picture(seed) for seed in range(3)]
    pixels = np.stack([tiny_checkpoint.transform.pixels(image) for image in images])
    for embeddings, exact in (
        (await embedder.embed_texts(read(TEXTS)), library_text_embedding(tiny_checkpoint, *TEXTS)),
        (await embedder.embed_images(pixels), library_image_embedding(tiny_checkpoint, *images)),
    ):
        assert 1e-5 < abs(embeddings - exact).max() < 0.02
        np.testing.assert_allclose((embeddings * exact).sum(1), 1, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


async def test_each_text_is_computed_once(embedder: Embedder, read: Callable[[list[str]], TokenBatch]) -> None:
    first = await embedder.embed_texts(read(TEXTS))
    assert (embedder.texts.counts.items, embedder.cache_hits) == (len(set(TEXTS)), 0)
    repeated = await embedder.embed_texts(read([*TEXTS, "a new text"]))
    np.testing.assert_array_equal(repeated[:-1], first)
    assert (embedder.texts.counts.items, embedder.cache_hits) == (len(set(TEXTS)) + 1, len(TEXTS))


async def test_the_cache_is_bounded_and_keeps_recent_texts(
    embedder: Embedder, read: Callable[[list[str]], TokenBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHED_TEXTS", 2)
    for text in ("one", "two", "one", "three", "one"):
        await embedder.embed_texts(read([text]))
    assert (embedder.texts.counts.items, embedder.cache_hits) == (3, 2)


async def test_texts_are_padded_to_their_batch_not_to_the_context_length(
    embedder: Embedder, read: Callable[[list[str]], TokenBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"word{number} " * (2 + number * 7 % 60) for number in range(100)]
    await asyncio.gather(*(embedder.embed_texts(read([text])) for text in words))
    counts = embedder.texts.counts
    assert counts.batches < 20
    assert counts.cost / counts.padded_cost > 0.85
    assert counts.padded_cost < counts.items * 248 / 2


async def test_a_text_that_fails_in_the_model_fails_only_its_own_request(
    embedder: Embedder, tiny_checkpoint: Checkpoint, read: Callable[[list[str]], TokenBatch]
) -> None:
    invalid = read(["a dog"])
    invalid.input_ids[0, 1] = 60_000  # outside the vocabulary
    requests = [embedder.embed_texts(batch) for batch in (read(["a cat"]), invalid, read(["a boat"]))]
    cat, failed, boat = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(failed, IndexError)
    expected = library_text_embedding(tiny_checkpoint, "a cat", "a boat")
    np.testing.assert_allclose(np.concatenate([cat, boat]), expected, atol=1e-5)
    await embedder.check()


async def test_the_health_check_does_not_wait_for_the_queue(
    embedder: Embedder, read: Callable[[list[str]], TokenBatch]
) -> None:
    flood = [asyncio.create_task(embedder.embed_texts(read([f"{row} " * 200] * 2))) for row in range(300)]
    await asyncio.sleep(0)
    waiting = embedder.texts.waiting
    await embedder.check()
    assert embedder.texts.waiting > waiting / 2
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_warming_up_measures_the_speed_of_both_queues(embedder: Embedder) -> None:
    await embedder.warm_up()
    assert embedder.texts.counts.cost == 248
    assert embedder.images.counts.items == 1
    texts = asyncio.ensure_future(embedder.texts.submit([torch.tensor([49406, 320, 49407])] * 4))
    images = asyncio.ensure_future(embedder.images.submit([np.zeros((32, 32, 3), np.uint8)] * 4))
    await asyncio.sleep(0)
    assert embedder.texts.delay > 0
    assert embedder.images.delay > 0
    await asyncio.gather(texts, images)


async def test_the_health_check_detects_a_broken_model(embedder: Embedder, tiny_checkpoint: Checkpoint) -> None:
    await embedder.check()
    weight = tiny_checkpoint.model.text_projection.weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="not finite"):
            await embedder.check()
    finally:
        weight.data.copy_(before)
