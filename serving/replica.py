"""The deployment: every replica holds the model and answers HTTP itself, so a request needs no second process.

An update replaces replicas one by one, each with its model and its index at once. Whichever of them answers, the
vectors that it compares are of one model.
"""

from fastapi import FastAPI
from ray import serve

from longclip.checkpoint import load_checkpoint
from serving import telemetry
from serving.api import create_api
from serving.artifacts import Model, fetch
from serving.embedder import Embedder
from serving.fetching import ImageFetcher
from serving.index_source import IndexVersion, open_index
from serving.inputs import MAX_IMAGE_BYTES
from serving.searching import LocalSearcher
from serving.service import Service


@serve.ingress()
class Replica:
    """Model, index and HTTP API in one process."""

    def __init__(
        self,
        model: Model,
        torch_threads: int,
        index: IndexVersion | None,
        key_digests: frozenset[str],
        image_hosts: frozenset[str],
    ) -> None:
        checkpoint = load_checkpoint(fetch(model))
        self._embedder = Embedder(checkpoint, torch_threads)
        searcher = LocalSearcher(open_index(index)) if index else None
        fetcher = ImageFetcher(image_hosts, MAX_IMAGE_BYTES) if image_hosts else None
        self._service = Service(model, checkpoint, self._embedder, searcher, fetcher)
        self._key_digests = key_digests
        self._telemetry = telemetry.Telemetry({"texts": self._embedder.texts, "images": self._embedder.images})

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self._service, self._key_digests, telemetry.cluster_metrics)
        api.add_middleware(telemetry.Measured)
        return api

    async def check_health(self) -> None:
        """Serve asks regularly, and replaces a replica whose model does not run any more."""
        await self._embedder.check()
        index = self._service.index_info
        self._telemetry.publish(self._embedder.remembered, None if index is None else (str(index.version), index.count))
