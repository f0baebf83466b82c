"""Prometheus metrics of replicas: requests, stages, batches, queues.

Replicas report to Ray, whose exporter on each node has the metrics of all replicas there. Any replica can therefore
answer `GET /metrics` for the whole application; otherwise each scrape would return those of a different replica.
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
"""Prefix of all metrics of this application in Ray's export."""
SCRAPE_SECONDS = 5.0
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]

_requests = Counter("longclip_requests", "Number of requests by endpoint and HTTP status.", ("endpoint", "status"))
_request_seconds = Histogram("longclip_request_seconds", "Duration of requests in seconds.", _SECONDS, ("endpoint",))
_stage_seconds = Histogram("longclip_stage_seconds", "Seconds per stage of a request.", _SECONDS, ("stage",))
_batches = Counter("longclip_batch", "Totals of the batches by queue and unit.", ("queue", "unit"))
_remembered = Counter("longclip_texts_remembered", "Number of texts whose embedding came from the cache.")
_waiting = Gauge("longclip_waiting", "Number of queued items.", ("queue",))
_index_items = Gauge("longclip_index_items", "Number of items in the index.", ("version",))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure the duration of a stage of a request."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _stage_seconds.observe(time.perf_counter() - start, {"stage": name})


class Reporter:
    """Reports the counts of queues as metrics."""

    def __init__(self, queues: Mapping[str, MicroBatcher]) -> None:
        self._queues = queues
        self._reported: dict[tuple[str, str], int] = {}

    def report(self, cache_hits: int, index: tuple[str, int] | None) -> None:
        """Report the changes since the last call.

        Args:
            cache_hits: total number of texts whose embedding came from the cache.
            index: version and number of items of the index.
        """
        for queue, batcher in self._queues.items():
            _waiting.set(batcher.waiting, {"queue": queue})
            for unit, count in asdict(batcher.counts).items():
                self._add(_batches, count, {"queue": queue, "unit": unit})
        self._add(_remembered, cache_hits, {})
        if index is not None:
            _index_items.set(index[1], {"version": index[0]})

    def _add(self, counter: Counter, count: int, tags: dict[str, str]) -> None:
        key = (str(counter.info["name"]), str(sorted(tags.items())))
        if count > self._reported.get(key, 0):
            counter.inc(count - self._reported.get(key, 0), tags)
            self._reported[key] = count


class RequestMetrics:
    """ASGI middleware: counts requests and measures their duration."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), "499"  # nginx's status for a client that disconnected before the response

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            # The endpoint's name instead of the path: paths contain ids, so their number is unbounded.
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            _requests.inc(1, {"endpoint": endpoint, "status": status})
            _request_seconds.observe(time.perf_counter() - start, {"endpoint": endpoint})


async def cluster_metrics() -> str:
    """The application's metrics from all nodes, in Prometheus text format."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes if node["Alive"]
    ]
    families: dict[str, Metric] = {}
    async for text in _scrape(urls):
        for family in text_string_to_metric_families(text):
            if family.name.startswith(EXPORTED):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += family.samples
    registry = CollectorRegistry()
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry).decode()


async def _scrape(urls: list[str]) -> AsyncIterator[str]:
    timeout = aiohttp.ClientTimeout(total=SCRAPE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for url in urls:
            try:
                async with session.get(url) as response:
                    yield await response.text()
            except (aiohttp.ClientError, TimeoutError):
                continue  # the node may be shutting down; report the others


class _Collected:
    """A collector of given metric families, as prometheus_client requires."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """All families."""
        return self._families
