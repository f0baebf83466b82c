"""What a replica tells Prometheus: requests, stages, batches, queue.

Replicas report to Ray, whose exporter on each node knows all replicas there. So any replica can answer `GET /metrics`
for the whole application, and what a scrape through the proxy finds is not that of now one replica, now another.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import aiohttp
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.batching import MicroBatcher

EXPORTED = "ray_longclip_"
"""Ray puts its own name in front of every metric."""
SCRAPE_SECONDS = 5.0
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]

_requests = Counter("longclip_requests", "Requests, by endpoint and HTTP status.", ("endpoint", "status"))
_request_seconds = Histogram("longclip_request_seconds", "Time to answer.", _SECONDS, ("endpoint",))
_stage_seconds = Histogram("longclip_stage_seconds", "Time of a request in a stage.", _SECONDS, ("stage",))
_batches = Counter("longclip_batch", "What batches held, by queue and unit.", ("queue", "unit"))
_remembered = Counter("longclip_texts_remembered", "Texts answered from memory, without the model.")
_waiting = Gauge("longclip_waiting", "Items that wait for a run.", ("queue",))
_index_items = Gauge("longclip_index_items", "Items of the index.", ("version",))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure a part of a request."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _stage_seconds.observe(time.perf_counter() - start, {"stage": name})


class Telemetry:
    """Turns the counts that queues keep into metrics."""

    def __init__(self, queues: Mapping[str, MicroBatcher]) -> None:
        self._queues = queues
        self._told: dict[tuple[str, str], int] = {}

    def publish(self, remembered: int, index: tuple[str, int] | None) -> None:
        """Report what was added since the last call.

        Args:
            remembered: texts answered from memory so far.
            index: version and items of the index.
        """
        for queue, batcher in self._queues.items():
            _waiting.set(batcher.waiting, {"queue": queue})
            for unit, count in asdict(batcher.counts).items():
                self._add(_batches, count, {"queue": queue, "unit": unit})
        self._add(_remembered, remembered, {})
        if index is not None:
            _index_items.set(index[1], {"version": index[0]})

    def _add(self, counter: Counter, count: int, tags: dict[str, str]) -> None:
        key = (str(counter.info["name"]), str(sorted(tags.items())))
        if count > self._told.get(key, 0):
            counter.inc(count - self._told.get(key, 0), tags)
            self._told[key] = count


class Measured:
    """ASGI middleware: counts requests and their time."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), "499"  # nginx's number for a client that went away before the answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The endpoint's name, not the path: paths hold ids, and anybody can invent more of them.
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            _requests.inc(1, {"endpoint": endpoint, "status": status})
            _request_seconds.observe(time.perf_counter() - start, {"endpoint": endpoint})


async def cluster_metrics() -> str:
    """Our metrics of all nodes, in Prometheus' text format."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes if node["Alive"]
    ]
    families: dict[str, Metric] = {}
    async for text in _scraped(urls):
        for family in text_string_to_metric_families(text):
            if family.name.startswith(EXPORTED):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += family.samples
    registry = CollectorRegistry()
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry).decode()


async def _scraped(urls: list[str]) -> AsyncIterator[str]:
    timeout = aiohttp.ClientTimeout(total=SCRAPE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for url in urls:
            try:
                async with session.get(url) as response:
                    yield await response.text()
            except (aiohttp.ClientError, TimeoutError):
                continue  # a node that is going away; the others are still worth telling


class _Collected:
    """Families as prometheus_client collects them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """All of them."""
        return self._families
