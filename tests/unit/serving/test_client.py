"""The Python client, the official openai client, and a fuzzer, against the API over HTTP."""

import asyncio
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from longclip.checkpoint import Checkpoint
from serving import client as client_module
from serving.api import create_api
from serving.client import AsyncClient, Client, Input, ServerError
from tests.support.live_api import KEY, running_api, scenes_api, scenes_operations
from tests.support.pictures import picture
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene, write_index


@pytest.fixture(scope="module")
def index(tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("client") / "index", tiny_checkpoint, tiny_checkpoint_dir)


@pytest.fixture(scope="module")
def url(index: Path, tiny_checkpoint_dir: Path) -> Iterator[str]:
    with running_api(scenes_api(tiny_checkpoint_dir, index)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url, KEY, retries=0) as client:
        yield client


FUZZING = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
CONFORMANCE: Any = [content_type_conformance, response_schema_conformance]

# ---- our client


def test_texts_and_images_in_any_order(client: Client, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture(1))
    inputs: list[Input] = ["a dog", picture(0), scene(2)[1], file, Image.open(io.BytesIO(picture(2)))]
    vectors = client.embed(inputs)
    expected = library_text_embedding(tiny_checkpoint, "a dog", scene(2)[1])
    np.testing.assert_allclose(vectors[[0, 2]], expected, atol=1e-5)
    expected = library_image_embedding(tiny_checkpoint, *(picture(seed) for seed in range(3)))
    np.testing.assert_allclose(vectors[[1, 3, 4]], expected, atol=1e-5)
    assert client.embed([]).shape == (0, 0)


def test_many_texts_go_in_several_requests_and_progress_is_told(
    client: Client, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TEXTS_PER_REQUEST", 7)
    texts = [f"picture number {number}" for number in range(40)]
    told: list[tuple[int, int]] = []
    vectors = client.embed(texts, progress=lambda done, of: told.append((done, of)))
    np.testing.assert_allclose(vectors, library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)
    assert told[-1] == (40, 40)
    assert len(told) == 6


def test_an_error_names_the_item_of_the_call(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "IMAGES_PER_REQUEST", 2)
    with pytest.raises(ServerError) as refused:
        client.embed(["a", picture(), picture(), picture(), b"no image"])
    error = refused.value
    assert (error.status, error.code, error.param) == (422, "invalid_image", "input[4]")
    with pytest.raises(ServerError) as refused:
        client.embed(["a long text, longer than the model reads " * 40])
    assert refused.value.code == "context_length_exceeded"
    assert client.embed(["a long text, longer than the model reads " * 40], truncate=True).shape == (1, 24)


def test_search_and_classification(client: Client) -> None:
    (best, *_) = client.search(text=scene(4)[1], target="caption", top_k=3)["hits"]
    assert best["id"] == "scene/4"
    queries: list[dict[str, Any]] = [
        {"image": scene(4)[0]},
        {"id": "scene/4"},
        {"embedding": client.embed([scene(4)[0]])[0]},
    ]
    for query in queries:
        hits = client.search(**query, filter={"number": {"gte": 3}}, top_k=COUNT)["hits"]
        assert {hit["metadata"]["number"] for hit in hits} <= set(range(3, COUNT))
    (found,) = client.classify([scene(4)[0]], ["boat", "dog"], templates=["{} at sea", "a {}"])
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert client.info()["model"]["embedding_dim"] == 24


def test_without_the_key_nothing_is_answered(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(url) as client, pytest.raises(ServerError) as refused:
        client.info()
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    monkeypatch.setenv("LONGCLIP_API_KEY", KEY)
    with Client(url) as client:
        assert client.info()["model"]["context_length"] == 248
        assert KEY not in repr(client)


class Moody(BaseHTTPRequestHandler):
    """Answers `/info` as its server's list of moods says, then well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        moods: list[str] = self.server.moods  # type: ignore[attr-defined]
        mood = moods.pop(0) if moods else "200"
        if mood == "drop":
            self.close_connection = True
            self.connection.close()
            return
        body = (
            b'{"ok": true}'
            if mood == "200"
            else b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
        )
        self.send_response(int(mood))
        self.send_header("Content-Length", str(len(body)))
        if mood == "429":
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def moody() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("moods", "pauses"), [(["503", "drop"], [0.2, 0.4]), (["429"], [1.0]), (["429", "503", "drop"], [1.0, 0.4, 0.8])]
)
def test_what_may_pass_is_tried_again_after_a_pause(
    moody: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, moods: list[str], pauses: list[float]
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(client_module, "sleep", sleep)
    moody.moods = list(moods)  # type: ignore[attr-defined]
    with Client(f"http://127.0.0.1:{moody.server_port}") as client:
        assert client.info() == {"ok": True}
    assert len(slept) == len(pauses)
    for seconds, longest in zip(slept, pauses, strict=True):
        assert longest / 2 <= seconds <= longest


def test_what_will_not_pass_is_not_and_patience_ends(
    moody: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    with Client(f"http://127.0.0.1:{moody.server_port}", retries=2) as client:
        moody.moods = ["422", "503"]  # type: ignore[attr-defined]
        with pytest.raises(ServerError, match="m"):
            client.info()
        assert moody.moods == ["503"]  # type: ignore[attr-defined]
        moody.moods = ["503"] * 4  # type: ignore[attr-defined]
        with pytest.raises(ServerError) as refused:
            client.info()
        assert (refused.value.status, len(moody.moods)) == (503, 1)  # type: ignore[attr-defined]
    with Client("http://127.0.0.1:9", retries=1) as client, pytest.raises(ServerError, match="cannot be reached"):
        client.info()


def test_requests_under_way_are_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TEXTS_PER_REQUEST", 1)

    async def most() -> int:
        running, peak = 0, 0
        async with AsyncClient(url, KEY, requests_at_once=3) as client:
            ask = client._request

            async def counted(*arguments: str, **content: Any) -> Any:
                nonlocal running, peak
                running += 1
                peak = max(peak, running)
                try:
                    return await ask(*arguments, **content)
                finally:
                    running -= 1

            client._request = counted  # type: ignore[assignment, method-assign]
            await client.embed([f"text {number}" for number in range(20)])
        return peak

    assert asyncio.run(most()) == 3


def test_work_for_a_client_that_left_is_given_up(
    index: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Serve, whose own proxy would cancel the request, as behind HAProxy."""
    operations = scenes_operations(tiny_checkpoint_dir, index)
    started, given_up = threading.Event(), threading.Event()

    async def embed_texts(tokens: object) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.set()
            raise

    with running_api(create_api(operations)) as url:
        with monkeypatch.context() as patch:
            patch.setattr(operations.embedder, "embed_texts", embed_texts)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/embeddings", json={"input": "a dog"}, timeout=httpx.Timeout(60, read=0.5))
            assert started.is_set()
            assert given_up.wait(10)
        with Client(url) as client:
            assert client.embed(["still there"]).shape == (1, 24)


# ---- the openai client


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_openai_client_works(openai_client: openai.OpenAI, tiny_checkpoint: Checkpoint) -> None:
    texts = ["a dog", "two boats on a river at dusk"]
    answer = openai_client.embeddings.create(model="tiny", input=texts)  # asks for base64 by itself
    expected = library_text_embedding(tiny_checkpoint, *texts)
    np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, atol=1e-5)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    one = openai_client.embeddings.create(model="tiny", input="a dog", encoding_format="float", dimensions=24)
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-5)
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_the_openai_client_gets_its_own_errors(url: str, openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        openai_client.embeddings.create(model="other", input="a dog")
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError, match="reads 248"):
        openai_client.embeddings.create(model="tiny", input="word " * 300)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


# ---- the contract


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_no_request_breaks_the_contract(
    index: Path, tiny_checkpoint_dir: Path, mode: schemathesis.GenerationMode
) -> None:
    """Whatever the schema allows, and whatever it does not: no 5xx, and answers have the shape that is promised."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", scenes_api(tiny_checkpoint_dir, index, key=None))
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) >= 10
    if mode is schemathesis.GenerationMode.NEGATIVE:  # what takes nothing cannot be asked for wrongly
        operations = [operation for operation in operations if operation.body]
    statuses = set[int]()
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def check(case: schemathesis.Case) -> None:
            response = case.call()
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text
            case.validate_response(response, checks=CONFORMANCE)

        check()
    if mode is schemathesis.GenerationMode.NEGATIVE:
        assert statuses == {422}
    else:
        assert 200 in statuses
