"""The Python client, the official openai client, and a fuzzer, using the API over HTTP."""

import asyncio
import io
import subprocess
import sys
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
from tests.support.live_api import KEY, running_api, scenes_api, tiny_operations
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene


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

# ---- the Python client

ONLY_CLIENT = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[4].split():
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocked())
from serving.client import AsyncClient, Client, ServerError
with Client(sys.argv[1], sys.argv[2], retries=0) as client:
    assert client.embed(["a dog", open(sys.argv[3], "rb").read()]).shape == (2, 24)
    assert client.search(text="a dog", top_k=3)["hits"]
    assert client.classify(["a dog"], ["boat", "dog"])
    assert client.info()["model"]["id"] == "tiny"
    try:
        client.embed([""])
    except ServerError as error:
        assert error.code == "empty_text"
"""


def test_the_client_needs_httpx_numpy_and_pillow_only(url: str, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    image.write_bytes(picture())
    blocked = "fastapi starlette pydantic ray torch transformers mlflow pyarrow aiohttp"
    command = [sys.executable, "-c", ONLY_CLIENT, url, KEY, str(image), blocked]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def test_texts_and_images_can_be_mixed(client: Client, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture(1))
    inputs: list[Input] = ["a dog", picture(0), scene(2)[1], file, Image.open(io.BytesIO(picture(2)))]
    vectors = client.embed(inputs)
    expected = library_text_embedding(tiny_checkpoint, "a dog", scene(2)[1])
    np.testing.assert_allclose(vectors[[0, 2]], expected, atol=1e-5)
    expected = library_image_embedding(tiny_checkpoint, *(picture(seed) for seed in range(3)))
    np.testing.assert_allclose(vectors[[1, 3, 4]], expected, atol=1e-5)
    assert client.embed([]).shape == (0, 0)


def test_many_texts_are_split_and_progress_is_reported(
    client: Client, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TEXTS_PER_REQUEST", 7)
    texts = [f"picture number {number}" for number in range(40)]
    reports: list[tuple[int, int]] = []
    vectors = client.embed(texts, progress=lambda done, total: reports.append((done, total)))
    np.testing.assert_allclose(vectors, library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)
    assert reports[-1] == (40, 40)
    assert len(reports) == 6


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
    (probabilities,) = client.classify([scene(4)[0]], ["boat", "dog"], templates=["{} at sea", "a {}"])
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert client.info()["model"]["embedding_dim"] == 24


def test_requests_without_the_key_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(url) as client, pytest.raises(ServerError) as refused:
        client.info()
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    monkeypatch.setenv("LONGCLIP_API_KEY", KEY)
    with Client(url) as client:
        assert client.info()["model"]["context_length"] == 248
        assert KEY not in repr(client)


class Unreliable(BaseHTTPRequestHandler):
    """Responds to `/info` with the statuses in the `script` of its server ("drop": no response), then with 200."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        script: list[str] = self.server.script  # type: ignore[attr-defined]
        status = script.pop(0) if script else "200"
        if status == "drop":
            self.close_connection = True
            self.connection.close()
            return
        body = (
            b'{"ok": true}'
            if status == "200"
            else b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
        )
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(body)))
        if status == "429":
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("script", "pauses"), [(["503", "drop"], [0.2, 0.4]), (["429"], [1.0]), (["429", "503", "drop"], [1.0, 0.4, 0.8])]
)
def test_temporary_errors_are_retried_after_a_pause(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, script: list[str], pauses: list[float]
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(client_module, "sleep", sleep)
    server.script = list(script)  # type: ignore[attr-defined]
    with Client(f"http://127.0.0.1:{server.server_port}") as client:
        assert client.info() == {"ok": True}
    assert len(slept) == len(pauses)
    for seconds, longest in zip(slept, pauses, strict=True):
        assert longest / 2 <= seconds <= longest


def test_permanent_errors_are_not_retried_and_retries_are_limited(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    with Client(f"http://127.0.0.1:{server.server_port}", retries=2) as client:
        server.script = ["422", "503"]  # type: ignore[attr-defined]
        with pytest.raises(ServerError, match="m"):
            client.info()
        assert server.script == ["503"]  # type: ignore[attr-defined]
        server.script = ["503"] * 4  # type: ignore[attr-defined]
        with pytest.raises(ServerError) as refused:
            client.info()
        assert (refused.value.status, len(server.script)) == (503, 1)  # type: ignore[attr-defined]
    with Client("http://127.0.0.1:9", retries=1) as client, pytest.raises(ServerError, match="cannot be reached"):
        client.info()


def test_concurrent_requests_are_limited(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_work_is_cancelled_when_the_client_disconnects(
    index: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's proxy cancels such requests itself; HAProxy and uvicorn only notify the application."""
    operations = tiny_operations(tiny_checkpoint_dir, index)
    started, cancelled = threading.Event(), threading.Event()

    async def embed_texts(tokens: object) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with running_api(create_api(operations)) as url:
        with monkeypatch.context() as patch:
            patch.setattr(operations.embedder, "embed_texts", embed_texts)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/embeddings", json={"input": "a dog"}, timeout=httpx.Timeout(60, read=0.5))
            assert started.is_set()
            assert cancelled.wait(10)
        with Client(url) as client:
            assert client.embed(["another text"]).shape == (1, 24)


# ---- the openai client


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_openai_client_works(openai_client: openai.OpenAI, tiny_checkpoint: Checkpoint) -> None:
    texts = ["a dog", "two boats on a river at dusk"]
    answer = openai_client.embeddings.create(model="tiny", input=texts)  # it requests base64
    expected = library_text_embedding(tiny_checkpoint, *texts)
    np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, atol=1e-5)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    one = openai_client.embeddings.create(model="tiny", input="a dog", encoding_format="float", dimensions=24)
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-5)
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_the_openai_client_raises_its_own_errors(url: str, openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        openai_client.embeddings.create(model="other", input="a dog")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError, match="reads 248"):
        openai_client.embeddings.create(model="tiny", input="word " * 300)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


# ---- the contract


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_responses_conform_to_the_schema(
    index: Path, tiny_checkpoint_dir: Path, mode: schemathesis.GenerationMode
) -> None:
    """Requests that the schema allows, and others, cause no status 5xx and get responses that the schema describes."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", scenes_api(tiny_checkpoint_dir, index, key=None))
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) >= 10
    if mode is schemathesis.GenerationMode.NEGATIVE:  # without a body there is nothing to get wrong
        operations = [operation for operation in operations if operation.body]
    statuses = set[int]()
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @FUZZING
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
