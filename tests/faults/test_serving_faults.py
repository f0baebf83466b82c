"""Faults of the serving application, with real Serve, replicas and load; nothing is mocked."""

import asyncio
import os
import re
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve

from serving.app import AppArgs, ApplicationError, build
from serving.limits import MAX_REQUESTS, MAX_TEXTS
from tests.support.processes import is_running, processes_below
from tests.support.variants import QUERY, Searches, Variant, check_answer, wait_until

pytestmark = pytest.mark.slow


class Application:
    """The application at `/`. A deployment takes seconds, so tests with the same arguments share it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._served: tuple[AppArgs, str | None] | None = None

    def deploy(self, args: AppArgs, fresh: bool = False) -> None:
        """Deploy with these arguments and the keys of the environment, unless it is deployed already."""
        wanted = (args, os.environ.get("LONGCLIP_API_KEYS"))
        if fresh or wanted != self._served:
            self._served = None
            serve.run(build(args), route_prefix="/")
            self._served = wanted

    def delete(self) -> None:
        """Delete the application."""
        self._served = None
        serve.delete("default")

    def search(self, **options: Any) -> httpx.Response:
        """Response to a search for `QUERY`."""
        return httpx.post(f"{self.url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}, **options)


@pytest.fixture(scope="module")
def application(url: str) -> Application:
    return Application(url)


def replica_pids() -> list[int]:
    return [pid for pid, name in processes_below(os.getpid()) if "ServeReplica" in name and is_running(pid)]


def switch_and_back(application: Application, variants: tuple[Variant, Variant], replicas: int) -> None:
    """A model and its index change together, under load, and no request fails."""
    first, second = variants
    application.deploy(first.args(replicas=replicas))
    with Searches(application.url) as load:
        load.wait_for(40)
        application.deploy(second.args(replicas=replicas))
        load.wait_for(40)
        application.deploy(first.args(replicas=replicas))
        load.wait_for(40)
    assert load.errors == []
    served = [check_answer(response, first, second) for response in load.answers]
    assert set(served) == {first.id, second.id}
    assert served[0] == served[-1] == first.id


def metric(url: str, pattern: str) -> float:
    """Sum of the latest reported values of a metric over all replicas."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(rf"^ray_longclip_{pattern}.*}} (\S+)$", text, re.MULTILINE))


def long_texts(count: int) -> list[str]:
    """Different texts of the full context length, which keep the model busy for a while."""
    return [" ".join(f"{number} {word}" for word in range(120)) for number in range(count)]


def test_model_and_index_switch_together_with_one_replica(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    switch_and_back(application, variants, replicas=1)


def test_overload_is_rejected_immediately_and_clears(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    first, _ = variants
    application.deploy(first.args())
    limits = httpx.Limits(max_connections=None)

    async def overload() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=application.url, timeout=120, limits=limits) as client:
            request = {"input": long_texts(40), "truncate": True, "encoding_format": "base64"}
            posts = (client.post("/v1/embeddings", json=request) for _ in range(2 * MAX_REQUESTS))
            return await asyncio.gather(*posts)

    answers = asyncio.run(overload())
    counts = Counter(response.status_code for response in answers)
    assert set(counts) == {200, 429}
    refused = [response for response in answers if response.status_code == 429]
    assert all(1 <= int(response.headers["Retry-After"]) < 60 for response in refused)
    assert {response.json()["error"]["code"] for response in refused} == {"overloaded"}
    check_answer(application.search(), first)


def test_requests_of_disconnected_clients_are_cancelled(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    first, _ = variants
    application.deploy(first.args(), fresh=True)  # resets the counters
    items = 'batch_total{.*queue="texts".*unit="items"'
    disconnected = 'requests_total{.*endpoint="embeddings".*status="499"'
    before, disconnected_before = metric(application.url, items), metric(application.url, disconnected)
    request, patience = {"input": long_texts(MAX_TEXTS)}, httpx.Timeout(60, read=0.7)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{application.url}/v1/embeddings", json=request, timeout=patience)
    wait_until(lambda: metric(application.url, disconnected) > disconnected_before)
    check_answer(application.search(), first)
    wait_until(
        lambda: metric(application.url, items) > before and metric(application.url, 'waiting{.*queue="texts"') == 0
    )
    assert metric(application.url, items) - before < MAX_TEXTS / 2


def test_slow_clients_do_not_block_others(application: Application, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    application.deploy(first.args())
    host, port = application.url.removeprefix("http://").split(":")
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    slow = [socket.create_connection((host, int(port))) for _ in range(30)]
    try:
        for connection in slow:
            connection.sendall(head.encode())
        for _ in range(20):
            check_answer(application.search(), first)
    finally:
        for connection in slow:
            connection.close()


def test_deleted_application_finishes_running_requests(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    first, _ = variants
    application.deploy(first.args())
    request = {"input": long_texts(MAX_TEXTS), "truncate": True, "encoding_format": "base64"}
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(httpx.post, f"{application.url}/v1/embeddings", json=request, timeout=60)
        time.sleep(1.5)  # the request has arrived, and takes some seconds
        assert not answer.done()
        application.delete()
    assert answer.result().status_code == 200
    assert len(answer.result().json()["data"]) == MAX_TEXTS


def test_model_and_index_switch_together_with_two_replicas(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    switch_and_back(application, variants, replicas=2)


def test_rejected_build_keeps_the_served_application(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    first, second = variants
    application.deploy(first.args(replicas=2))
    with pytest.raises(ApplicationError, match="made with"):
        build(AppArgs(model=str(first.model), index=str(second.index)))
    check_answer(application.search(), first)


def test_killed_replica_fails_only_its_own_requests(
    application: Application, variants: tuple[Variant, Variant]
) -> None:
    first, _ = variants
    application.deploy(first.args(replicas=2))
    wait_until(lambda: len(replica_pids()) == 2)  # replicas of the previous application end a little later
    before = replica_pids()
    with Searches(application.url) as load:
        load.wait_for(40)
        os.kill(before[0], signal.SIGKILL)
        load.wait_for(40)
        deadline = time.monotonic() + 60
        while len(replica_pids()) < 2 or before[0] in replica_pids():
            assert time.monotonic() < deadline, "no new replica"
            time.sleep(0.5)
        load.wait_for(40)
    for response in load.answers:
        if response.status_code == 200:
            check_answer(response, first)
    failed = Counter(r.status_code for r in load.answers if r.status_code != 200) + Counter(
        type(error).__name__ for error in load.errors
    )
    assert failed.total() <= 2 * load.clients, (
        f"more than the requests in flight, or sent before the loss was noticed: {failed}"
    )
    assert set(failed) <= {500, 503}, failed
    assert all(response.status_code == 200 for response in load.answers[-40:])


def test_every_replica_requires_a_key(
    application: Application, variants: tuple[Variant, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = variants
    monkeypatch.setenv("LONGCLIP_API_KEYS", "a-key-of-the-team-0123, another-one-4567890")
    application.deploy(first.args(replicas=2))
    for _ in range(6):
        assert application.search().status_code == 401
        check_answer(application.search(headers={"Authorization": "Bearer a-key-of-the-team-0123"}), first)
    assert httpx.get(f"{application.url}/readyz").status_code == 200
