"""The operations of the API without HTTP: each takes a request and returns a response."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import torch

from longclip.checkpoint import Checkpoint
from longclip.index import Match
from longclip.tokenizer import TokenBatch
from longclip.zero_shot import class_means, class_prompts
from serving import decoding, limits, schemas
from serving.batching import MicroBatcher
from serving.embedder import Embedder
from serving.errors import ApiError
from serving.fetching import ImageFetcher, NotFetchedError
from serving.model_source import Model
from serving.searcher import Searcher
from serving.telemetry import stage

Decoded = TypeVar("Decoded")

NO_INDEX = "this server has no index; start it with index=DIRECTORY"


class Operations:
    """Embeds, searches and classifies with one model and, if there is one, the index built with it."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        embedder: Embedder,
        searcher: Searcher | None = None,
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self.embedder = embedder
        self._fetcher = fetcher
        self.model_info = schemas.ModelInfo(
            id=model.location.name,
            version=model.version,
            checkpoint_id=model.checkpoint_id,
            context_length=model.context_length,
            embedding_dim=model.embedding_dim,
            image_size=model.transform.image_size,
            precision=embedder.precision,
        )
        self.lineage = model.lineage
        self._searcher = searcher
        self._transform, self._tokenizer = checkpoint.transform, checkpoint.tokenizer
        self._tokenizer.model_max_length = model.context_length
        self._logit_scale = float(checkpoint.model.logit_scale.detach().exp())
        # asyncio's default pool has many more threads than there are cores, and would take CPU time from the model.
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), "decoder")
        self._free_decoders = asyncio.Semaphore(torch.get_num_threads())

    @property
    def index_info(self) -> schemas.IndexInfo | None:
        """Description of the index; None without an index."""
        return None if self._searcher is None else self._searcher.info

    @property
    def searcher(self) -> Searcher:
        """The index; raises `ApiError` if there is none."""
        if self._searcher is None:
            raise ApiError(404, NO_INDEX, "index_not_found")
        return self._searcher

    async def embed(self, request: schemas.EmbeddingsRequest) -> schemas.EmbeddingsResponse:
        """Unit-length embeddings of texts and images, in input order."""
        self._check_model(request.model)
        if request.dimensions not in (None, self.model_info.embedding_dim):
            raise ApiError(
                422,
                f"dimensions: the model's vectors have {self.model_info.embedding_dim}, not {request.dimensions}; they"
                " were not trained to be shortened",
                "invalid_value",
                "dimensions",
            )
        vectors, tokens, truncated = await self._embed_items(request.input, request.truncate)
        encode = _as_base64 if request.encoding_format == "base64" else _as_numbers
        return schemas.EmbeddingsResponse(
            model=self.model_info.id,
            data=[schemas.Embedding(index=row, embedding=encode(vector)) for row, vector in enumerate(vectors)],
            usage=schemas.Usage(prompt_tokens=tokens, total_tokens=tokens, truncated=truncated),
        )

    async def search(self, request: schemas.SearchRequest, prefix: str) -> schemas.SearchResponse:
        """The items of the index nearest to a text, an image, an item or a vector.

        Args:
            request: the query and its options.
            prefix: path prefix of the API, for the URLs of thumbnails.
        """
        start = time.perf_counter()
        searcher, query = self.searcher, request.query
        tokens, truncated, query_id = 0, 0, query.id
        if query_id is not None:
            stored = await searcher.vector(query_id, request.target)
            if stored is None:
                raise unknown_id("query.id")
            vector = stored
        elif query.embedding is not None:
            vector = self._unit_vector(query.embedding)
        else:
            item = schemas.Item(text=query.text, image=query.image)
            vectors, tokens, truncated = await self._embed_items([item], request.truncate, "query")
            vector = vectors[0]
        top_k = request.top_k + (query_id is not None)
        with stage("search"):
            matches = await searcher.search(vector, top_k, request.target, request.filter, request.exact)
        matches = [match for match in matches if match.id != query_id][: request.top_k]
        if request.min_score is not None:
            matches = [match for match in matches if match.score >= request.min_score]
        return schemas.SearchResponse(
            hits=[_hit(match, prefix) for match in matches],
            model=self.model_info,
            index=searcher.info,
            tokens=tokens,
            truncated=truncated > 0,
            took_ms=round((time.perf_counter() - start) * 1000, 2),
        )

    async def classify(self, request: schemas.ClassifyRequest) -> schemas.ClassifyResponse:
        """Zero-shot classification: compares each item with the mean embedding of each label's prompts."""
        self._check_model(request.model)
        prompts = class_prompts(request.labels, request.templates)
        if len(prompts) > limits.MAX_TEXTS:
            message = f"labels: {len(prompts)} prompts (labels x templates), at most {limits.MAX_TEXTS} are allowed"
            raise ApiError(413, message, "too_many_items", "labels")
        params = [f"labels[{row // len(request.templates)}]" for row in range(len(prompts))]
        tokens, _ = await self._decode_texts(prompts, params, truncate=False)
        (vectors, item_tokens, truncated), labels = await asyncio.gather(
            self._embed_items(request.input, request.truncate), self.embedder.embed_texts(tokens)
        )
        scores = vectors @ class_means(torch.from_numpy(labels), len(request.labels)).numpy().T  # [N, C]
        probabilities = torch.softmax(torch.from_numpy(self._logit_scale * scores), -1).numpy()
        return schemas.ClassifyResponse(
            model=self.model_info.id,
            data=[
                schemas.Classification(
                    index=row,
                    labels=[
                        schemas.LabelScore(
                            label=request.labels[best],
                            score=float(scores[row, best]),
                            probability=float(probabilities[row, best]),
                        )
                        for best in np.argsort(-scores[row], kind="stable")[: request.top_k].tolist()
                    ],
                )
                for row in range(len(vectors))
            ],
            usage=schemas.Usage(prompt_tokens=item_tokens, total_tokens=item_tokens, truncated=truncated),
        )

    async def count_tokens(self, text: str) -> int:
        """Number of tokens of a whole text, including the start and end tokens."""
        return await self._decode(decoding.token_count, self._tokenizer, text)

    async def not_ready(self) -> list[str]:
        """Reasons why requests would fail at the moment; empty if they would not."""
        reasons = []
        for name, check in (("model", self.embedder.check), ("index", self._searcher and self._searcher.check)):
            try:
                if check:
                    await check()
            except Exception as error:  # whatever it is, requests would fail with it too
                reasons.append(f"{name}: {type(error).__name__}")
        return reasons

    def _check_model(self, model: str | None) -> None:
        info = self.model_info
        if model not in (None, info.id, f"{info.id}/{info.version}"):
            raise ApiError(404, f"model: this server has only '{info.id}'", "model_not_found", "model")

    async def _embed_items(
        self, items: Sequence[schemas.Item], truncate: bool, name: str = "input"
    ) -> tuple[np.ndarray, int, int]:
        """Embeddings `[N, E]` of N items, number of tokens, and number of truncated texts."""
        params = [f"{name}[{row}]" if name == "input" else f"{name}.{item.kind}" for row, item in enumerate(items)]
        texts = [row for row, item in enumerate(items) if item.text is not None]
        images = [row for row, item in enumerate(items) if item.image is not None]
        for kind, rows, limit in (("texts", texts, limits.MAX_TEXTS), ("images", images, limits.MAX_IMAGES)):
            if len(rows) > limit:
                message = f"{name}: {len(rows)} {kind}, at most {limit} are allowed in one request"
                raise ApiError(413, message, "too_many_items", name)
        # All items are decoded before any is embedded, so an invalid item costs no run of the model.
        batch, truncated = None, 0
        if texts:
            batch, truncated = await self._decode_texts(
                [items[row].text or "" for row in texts], [params[row] for row in texts], truncate
            )
        pixels = await asyncio.gather(*(self._decode_image(items[row].image or "", params[row]) for row in images))
        calls: list[Awaitable[np.ndarray]] = []
        if batch is not None:
            calls.append(self.embedder.embed_texts(batch))
        if pixels:
            calls.append(self.embedder.embed_images(np.stack(pixels)))
        vectors = np.empty((len(items), self.model_info.embedding_dim), np.float32)
        with stage("embed"):
            vectors[texts + images] = np.concatenate(await asyncio.gather(*calls))
        return vectors, 0 if batch is None else int(batch.lengths.sum()), truncated

    async def _decode_texts(self, texts: list[str], params: list[str], truncate: bool) -> tuple[TokenBatch, int]:
        arguments = (self._tokenizer, texts, params, truncate)
        return await self._decode(decoding.decode_texts, *arguments, queue=self.embedder.texts)

    async def _decode_image(self, image: str, param: str) -> np.ndarray:
        if self._fetcher is None or image[:8].lower() != "https://":
            arguments = (self._transform, image, param)
            return await self._decode(decoding.decode_base64_image, *arguments, queue=self.embedder.images)
        try:
            with stage("fetch"):
                data = await self._fetcher.fetch(image)
        except NotFetchedError:
            message = f"{param}: not an allowed URL of an image of at most {limits.MAX_IMAGE_BYTES} bytes"
            raise ApiError(422, message, "image_not_fetched", param) from None
        return await self._decode(decoding.decode_image_file, self._transform, data, param)

    async def _decode(
        self, decode: Callable[..., Decoded], *arguments: Any, queue: MicroBatcher[Any, Any] | None = None
    ) -> Decoded:
        """Run a function of `decoding` in the thread pool; with a `queue`, refuse the request first if it is full."""
        with stage("read"):
            async with self._free_decoders:
                if queue:
                    queue.admit()
                return await asyncio.get_running_loop().run_in_executor(self._decoders, decode, *arguments)

    def _unit_vector(self, values: list[float]) -> np.ndarray:
        param = "query.embedding"
        if len(values) != self.model_info.embedding_dim:
            message = f"{param}: {len(values)} numbers, the model's vectors have {self.model_info.embedding_dim}"
            raise ApiError(422, message, "invalid_value", param)
        vector = np.array(values, np.float64)
        length = np.linalg.norm(vector)
        if not 0 < length < np.inf:
            raise ApiError(
                422, f"{param}: the vector's length is {length}; it must be positive and finite", "invalid_value", param
            )
        return (vector / length).astype(np.float32)


def unknown_id(param: str) -> ApiError:
    """The error for an item that is not in the index."""
    return ApiError(404, f"{param}: the index has no such item", "id_not_found", param)


def _as_numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


def _as_base64(vector: np.ndarray) -> str:
    """Little-endian float32, the format that OpenAI's clients request."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _hit(match: Match, prefix: str) -> schemas.Hit:
    return schemas.Hit(
        id=match.id,
        score=match.score,
        caption=match.caption,
        metadata=match.metadata,
        thumbnail_url=f"{prefix}/v1/thumbnails/{quote(match.id, safe='')}",
    )
