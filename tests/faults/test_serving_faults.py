"""The serving application while things go wrong: real Serve, real replicas, real load; nothing is imitated."""

import asyncio
import os
import re
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray import serve

from serving.app import AppArgs, ApplicationError, build
from serving.limits import MAX_REQUESTS, MAX_TEXTS
from tests.support.processes import is_running, processes_below
from tests.support.variants import QUERY, Searches, Variant, check_answer, wait_until

pytestmark = pytest.mark.slow


def replica_pids() -> list[int]:
    return [pid for pid, name in processes_below(os.getpid()) if "ServeReplica" in name and is_running(pid)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_model_and_its_index_change_in_one_switch_and_back(
    url: str, variants: tuple[Variant, Variant], replicas: int
) -> None:
    first, second = variants
    serve.run(build(first.args(replicas=replicas)), route_prefix="/")
    with Searches(url) as load:
        load.wait_for(40)
        serve.run(build(second.args(replicas=replicas)), route_prefix="/")
        load.wait_for(40)
        serve.run(build(first.args(replicas=replicas)), route_prefix="/")
        load.wait_for(40)
    assert load.errors == []
    served = [check_answer(response, first, second) for response in load.answers]
    assert set(served) == {first.id, second.id}
    assert served[0] == served[-1] == first.id


def test_a_build_that_is_refused_leaves_what_is_served(url: str, variants: tuple[Variant, Variant]) -> None:
    first, second = variants
    serve.run(build(first.args(replicas=2)), route_prefix="/")
    with pytest.raises(ApplicationError, match="made with"):
        build(AppArgs(model=str(first.model), index=str(second.index)))
    check_answer(httpx.post(f"{url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)


def test_a_replica_that_is_killed_costs_its_own_requests_only(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args(replicas=2)), route_prefix="/")
    before = replica_pids()
    assert len(before) == 2
    with Searches(url) as load:
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
    assert failed.total() <= 2 * load.clients, f"more than those in flight, and sent before it was noticed: {failed}"
    assert set(failed) <= {500, 503}, failed
    assert all(response.status_code == 200 for response in load.answers[-40:])


def metric(url: str, pattern: str) -> float:
    """Sum of a metric over all replicas, as far as they have told it."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(rf"^ray_longclip_{pattern}.*}} (\S+)$", text, re.MULTILINE))


def long_texts(count: int) -> list[str]:
    """Texts of the whole context, all different, which keep the model busy for a while."""
    return [" ".join(f"{number} {word}" for word in range(120)) for number in range(count)]


def test_overload_is_refused_at_once_and_passes(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args()), route_prefix="/")
    limits = httpx.Limits(max_connections=None)

    async def overload() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            request = {"input": long_texts(40), "truncate": True, "encoding_format": "base64"}
            posts = (client.post("/v1/embeddings", json=request) for _ in range(2 * MAX_REQUESTS))
            return await asyncio.gather(*posts)

    answers = asyncio.run(overload())
    counts = Counter(response.status_code for response in answers)
    assert set(counts) == {200, 429}
    refused = [response for response in answers if response.status_code == 429]
    assert all(1 <= int(response.headers["Retry-After"]) < 60 for response in refused)
    assert {response.json()["error"]["code"] for response in refused} == {"overloaded"}
    check_answer(httpx.post(f"{url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)


def test_what_a_client_that_left_had_asked_for_is_not_computed(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args()), route_prefix="/")
    items = 'batch_total{.*queue="texts".*unit="items"'
    left = 'requests_total{.*endpoint="embeddings".*status="499"'
    before, left_before = metric(url, items), metric(url, left)
    request, patience = {"input": long_texts(MAX_TEXTS)}, httpx.Timeout(60, read=0.7)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/embeddings", json=request, timeout=patience)
    wait_until(lambda: metric(url, left) > left_before)
    check_answer(httpx.post(f"{url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)
    wait_until(lambda: metric(url, items) > before and metric(url, 'waiting{.*queue="texts"') == 0)
    assert metric(url, items) - before < MAX_TEXTS / 2


def test_slow_clients_hold_up_nobody(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args()), route_prefix="/")
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    slow = [socket.create_connection((host, int(port))) for _ in range(30)]
    try:
        for connection in slow:
            connection.sendall(head.encode())
        for _ in range(20):
            check_answer(httpx.post(f"{url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)
    finally:
        for connection in slow:
            connection.close()


def test_keys_are_asked_for_by_every_replica(
    url: str, variants: tuple[Variant, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = variants
    monkeypatch.setenv("LONGCLIP_API_KEYS", "a-key-of-the-team-0123, another-one-4567890")
    serve.run(build(first.args(replicas=2)), route_prefix="/")
    request = {"query": {"text": QUERY}, "top_k": 5}
    for _ in range(6):
        assert httpx.post(f"{url}/v1/search", json=request).status_code == 401
        headers = {"Authorization": "Bearer a-key-of-the-team-0123"}
        check_answer(httpx.post(f"{url}/v1/search", json=request, headers=headers), first)
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_an_application_that_is_taken_away_finishes_what_it_began(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args()), route_prefix="/")
    request = {"input": long_texts(MAX_TEXTS), "truncate": True, "encoding_format": "base64"}
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(httpx.post, f"{url}/v1/embeddings", json=request, timeout=60)
        time.sleep(1.5)  # it has arrived, and takes some seconds
        assert not answer.done()
        serve.delete("default")
    assert answer.result().status_code == 200
    assert len(answer.result().json()["data"]) == MAX_TEXTS
