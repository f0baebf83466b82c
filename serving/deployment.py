"""The deployment. Each replica holds the model and is the HTTP ingress, so a request takes a single process.

An update replaces replicas one at a time, the model together with its index, so a response never mixes the vectors of
two models.
"""

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from longclip.checkpoint import load_checkpoint
from serving import telemetry
from serving.api import create_api
from serving.embedder import Embedder, Precision
from serving.fetching import ImageFetcher
from serving.index_source import IndexVersion, open_index
from serving.limits import MAX_IMAGE_BYTES
from serving.model_source import Model, fetch_model
from serving.operations import Operations
from serving.retriever import ShardedSearcher
from serving.searcher import LocalSearcher, Searcher


@serve.ingress()
class Replica:
    """The model, the index (unless retrievers hold it) and the HTTP API in one process."""

    def __init__(
        self,
        model: Model,
        torch_threads: int,
        precision: Precision | None,
        index: IndexVersion | None,
        retrievers: DeploymentHandle | None,
        key_digests: frozenset[str],
        image_hosts: frozenset[str],
    ) -> None:
        checkpoint = load_checkpoint(fetch_model(model))
        self._embedder = Embedder(checkpoint, torch_threads, precision)
        self._searcher = open_searcher(index, retrievers) if index else None
        self._model_warm = self._index_checked = False
        fetcher = ImageFetcher(image_hosts, MAX_IMAGE_BYTES) if image_hosts else None
        self._operations = Operations(model, checkpoint, self._embedder, self._searcher, fetcher)
        self._key_digests = key_digests
        self._reporter = telemetry.Reporter({"texts": self._embedder.texts, "images": self._embedder.images})

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self._operations, self._key_digests, telemetry.cluster_metrics)
        api.add_middleware(telemetry.RequestMetrics)
        return api

    async def check_health(self) -> None:
        """Called by Serve at intervals; Serve replaces the replica if this raises.

        A replica receives no requests before the first successful call, so that call also warms up the model and checks
        the whole index. Later calls leave the index out: if its retrievers fail, replacing this replica would not help.
        """
        await self._embedder.check()
        if not self._model_warm:
            await self._embedder.warm_up()
            self._model_warm = True
        if self._searcher and not self._index_checked:
            await self._searcher.check()
            self._index_checked = True
        index = self._operations.index_info
        self._reporter.report(self._embedder.cache_hits, None if index is None else (str(index.version), index.count))


def open_searcher(index: IndexVersion, retrievers: DeploymentHandle | None) -> Searcher:
    """A searcher over an index held by the retrievers, or by this process if there are none."""
    return ShardedSearcher(index, retrievers) if retrievers else LocalSearcher(open_index(index))
