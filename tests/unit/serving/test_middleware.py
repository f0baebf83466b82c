"""API keys, admission, limits of bodies, request ids."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.requests import Request
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving.errors import install_handlers
from serving.middleware import Admission, ApiKeys, BodyLimit, RequestId, key_digest

pytestmark = pytest.mark.anyio

KEYS = ("first-key-0123456789", "second-key-0123456789")


def api_with(middleware: Any, **options: Any) -> FastAPI:
    """An application that returns the size of a body once `state.gate` is set; `state.arrived` counts bodies."""
    api = FastAPI()
    api.add_middleware(middleware, **options)
    install_handlers(api)
    api.state.gate = asyncio.Event()
    api.state.gate.set()
    api.state.arrived = asyncio.Semaphore(0)

    @api.post("/v1/count")
    async def count(request: Request) -> int:
        size = len(await request.body())
        api.state.arrived.release()
        await api.state.gate.wait()
        return size

    for path in ("/", "/healthz", "/readyz", "/metrics", "/static/app.js", "/info", "/v1/models"):
        api.add_api_route(path, lambda: "open")
    return api


@asynccontextmanager
async def client_of(api: FastAPI, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def code_of(response: httpx.Response) -> str:
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]["code"]


@pytest.mark.parametrize("root_path", ["", "/prefix"])
async def test_the_api_requires_one_of_the_keys(root_path: str) -> None:
    api = api_with(ApiKeys, digests=frozenset(map(key_digest, KEYS)))
    async with client_of(api, root_path) as client:
        for header in ({"Authorization": f"Bearer {KEYS[0]}"}, {"X-API-Key": KEYS[1]}):
            assert (await client.post(f"{root_path}/v1/count", content=b"ab", headers=header)).json() == 2
        wrong = [{}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {KEYS[0]}"}, {"X-API-Key": KEYS[0][:-1]}]
        for headers in wrong:
            for path in ("/v1/models", "/info", "/v1/nothing", "/healthz/../info"):
                response = await client.get(root_path + path, headers=headers)
                assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert not any(key in response.text for key in KEYS)
        for path in ("/", "/healthz", "/readyz", "/metrics", "/static/app.js"):
            assert (await client.get(root_path + path)).status_code == 200


async def test_without_keys_all_requests_are_accepted() -> None:
    async with client_of(api_with(ApiKeys, digests=frozenset())) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_excess_requests_are_refused_until_others_finish() -> None:
    api = api_with(Admission, max_requests=2, max_bytes=1000, default_bytes=1)
    api.state.gate.clear()
    async with client_of(api) as client:
        held = [asyncio.create_task(client.post("/v1/count", content=b"x" * 10)) for _ in range(2)]
        for _ in held:
            await api.state.arrived.acquire()
        response = await client.post("/v1/count", content=b"x")
        assert (response.status_code, code_of(response)) == (429, "overloaded")
        assert response.headers["Retry-After"] == "1"
        assert (await client.get("/healthz")).status_code == 200, "probes are always admitted"
        api.state.gate.set()
        assert [(await task).json() for task in held] == [10, 10]
        assert (await client.post("/v1/count", content=b"x")).json() == 1


async def test_bytes_in_flight_are_limited_but_a_single_body_is_admitted() -> None:
    api = api_with(Admission, max_requests=9, max_bytes=100, default_bytes=90)
    async with client_of(api) as client:
        for body, size in ((b"x" * 500, 500), (drip(1, 0), 1)):
            api.state.gate.clear()
            held = asyncio.create_task(client.post("/v1/count", content=body))
            await api.state.arrived.acquire()
            assert code_of(await client.post("/v1/count", content=b"x" * 11)) == "overloaded"
            api.state.gate.set()
            assert (await held).json() == size


async def test_a_failed_request_releases_its_place() -> None:
    async with client_of(api_with(Admission, max_requests=1, max_bytes=100, default_bytes=1)) as client:
        for _ in range(3):
            assert (await client.post("/v1/nothing", content=b"x")).status_code == 404


async def drip(pieces: int, seconds: float) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        await asyncio.sleep(seconds)
        yield b"x"


async def test_a_slow_body_is_refused() -> None:
    async with client_of(api_with(BodyLimit, max_bytes=1000, seconds=0.2)) as client:
        assert (await client.post("/v1/count", content=drip(3, 0.001))).json() == 3
        response = await client.post("/v1/count", content=drip(1000, 0.05))
        assert (response.status_code, code_of(response)) == (408, "request_timeout")


async def test_large_bodies_are_refused_whatever_their_content_length() -> None:
    async with client_of(api_with(BodyLimit, max_bytes=10, seconds=5)) as client:
        assert (await client.post("/v1/count", content=b"x" * 10)).json() == 10
        for body in (b"x" * 11, drip(11, 0)):
            response = await client.post("/v1/count", content=body)
            assert (response.status_code, code_of(response)) == (413, "body_too_large")
        wrong_length = await client.post("/v1/count", content=drip(11, 0), headers={"Content-Length": "5"})
        assert code_of(wrong_length) == "body_too_large"


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("given", "id"),
    [
        ({"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, TRACE),
        ({"traceparent": f"00-{TRACE}-00f067aa0ba902b7-00", "X-Request-ID": "mine"}, TRACE),
        ({"traceparent": f"cc-{TRACE}-00f067aa0ba902b7-01-what-comes-later"}, TRACE),
        ({"traceparent": f"ff-{TRACE}-00f067aa0ba902b7-01", "X-Request-ID": "mine"}, "mine"),
        ({"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"}, None),
        ({"traceparent": f"00-{TRACE}-{'0' * 16}-01"}, None),
        ({"traceparent": f"00-{TRACE.upper()}-00f067aa0ba902b7-01"}, None),
        ({"X-Request-ID": "host:7/a.b_c-d+e="}, "host:7/a.b_c-d+e="),
        ({"X-Request-ID": "a caption of a dog"}, None),
        ({"X-Request-ID": "x" * 129}, None),
        ({}, None),
    ],
)
async def test_the_request_id_is_the_trace_id_or_a_valid_request_id(given: dict[str, str], id: str | None) -> None:
    seen: list[str | None] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(Headers(scope=scope).get("x-request-id"))
        await PlainTextResponse("")(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(RequestId(inner)), base_url="http://test") as client:
        await client.get("/", headers=given)
    assert seen == [id]
