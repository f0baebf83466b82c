"""The deployment: every replica holds the model and answers HTTP itself, so a request needs no second process.

An update replaces replicas one by one, each with its model and its index at once. Whichever of them answers, the
vectors that it compares are of one model.
"""

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from longclip.checkpoint import load_checkpoint
from serving import telemetry
from serving.api import create_api
from serving.decoding import MAX_IMAGE_BYTES
from serving.embedder import Embedder, Precision
from serving.fetching import ImageFetcher
from serving.index_source import IndexVersion, open_index
from serving.model_source import Model, fetch
from serving.operations import Operations
from serving.retriever import ShardedSearcher
from serving.searcher import LocalSearcher, Searcher


@serve.ingress()
class Replica:
    """Model, index (unless retrievers hold it) and HTTP API in one process."""

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
        checkpoint = load_checkpoint(fetch(model))
        self._embedder = Embedder(checkpoint, torch_threads, precision)
        self._searcher = searcher(index, retrievers) if index else None
        self._warm = self._searched = False
        fetcher = ImageFetcher(image_hosts, MAX_IMAGE_BYTES) if image_hosts else None
        self._operations = Operations(model, checkpoint, self._embedder, self._searcher, fetcher)
        self._key_digests = key_digests
        self._telemetry = telemetry.Telemetry({"texts": self._embedder.texts, "images": self._embedder.images})

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self._operations, self._key_digests, telemetry.cluster_metrics)
        api.add_middleware(telemetry.Measured)
        return api

    async def check_health(self) -> None:
        """Serve asks regularly, and replaces a replica whose model does not run any more.

        It gets no requests before this answered for the first time. So the whole index must have been reached once; if
        retrievers fail later, other replicas would not do better.
        """
        await self._embedder.check()
        if not self._warm:
            await self._embedder.warm_up()
            self._warm = True
        if self._searcher and not self._searched:
            await self._searcher.check()
            self._searched = True
        index = self._operations.index_info
        self._telemetry.publish(self._embedder.remembered, None if index is None else (str(index.version), index.count))


def searcher(index: IndexVersion, retrievers: DeploymentHandle | None) -> Searcher:
    """An index in this process, or shared out among retrievers where there are some."""
    return ShardedSearcher(index, retrievers) if retrievers else LocalSearcher(open_index(index))
