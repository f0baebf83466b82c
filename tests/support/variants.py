"""Two models with an index each, and searches that tell which of them answered."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from longclip.checkpoint import Checkpoint, checkpoint_id, load_checkpoint, new_model, save_checkpoint
from tests.support.load import Load
from tests.support.scenes_index import library_image_embedding, library_text_embedding, scene, write_index
from tests.support.tiny_clip import tiny_config

COUNT = 12
QUERY = scene(5)[1]


class Variant:
    """A model, the index that was made with it, and the scores that a search with both must give."""

    def __init__(self, directory: Path, checkpoint: Checkpoint | None = None) -> None:
        self.model = directory / "longclip"
        save_checkpoint(checkpoint or new_model(tiny_config()), self.model, {"origin": "test"})
        self.checkpoint = load_checkpoint(self.model)
        self.id = checkpoint_id(self.model)
        self.index = write_index(directory / "index", self.checkpoint, self.model, COUNT, shards=3)
        pictures = library_image_embedding(self.checkpoint, *(scene(seed)[0] for seed in range(COUNT)))
        self.scores = np.sort(pictures @ library_text_embedding(self.checkpoint, QUERY)[0])[::-1][:5]

    def args(self, **options: Any) -> Any:
        from serving.app import AppArgs  # imports Ray Serve, which no other test should pay for

        return AppArgs(model=str(self.model), index=str(self.index), torch_threads=1, **options)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Variant, Variant]:
    """Two models of other weights."""
    first, second = (Variant(tmp_path_factory.mktemp(name)) for name in ("first", "second"))
    assert first.id != second.id
    assert np.abs(first.scores - second.scores).max() > 1e-3
    return first, second


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from tests.support.local_serve import local_serve

    with local_serve() as url:
        yield url


class Searches(Load):
    """The same search again and again, and what became of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.answers: list[httpx.Response] = []
        self.errors: list[Exception] = []

    def ask(self, client: httpx.Client, number: int) -> None:
        try:
            self.answers.append(client.post("/v1/search", json={"query": {"text": QUERY}, "top_k": 5}))
        except httpx.HTTPError as error:
            self.errors.append(error)

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Wait until so many more answers came."""
        target, deadline = len(self.answers) + count, time.monotonic() + seconds
        while len(self.answers) < target:
            assert time.monotonic() < deadline, f"only {len(self.answers)} answers, errors {self.errors[:3]}"
            time.sleep(0.05)


def check_answer(response: httpx.Response, *variants: Variant) -> str:
    """Whether an answer is that of one of the variants, model, index and scores together; gives the model's id."""
    assert response.status_code == 200, response.text
    answer = response.json()
    identity = answer["model"]["checkpoint_id"]
    assert answer["index"]["checkpoint_id"] == identity, "vectors of one model were searched in the index of another"
    expected = {variant.id: variant.scores for variant in variants}[identity]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], expected, atol=1e-5)
    return identity


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
