"""What the API does, without HTTP: requests in, responses out."""

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
from serving import decoding as inputs
from serving import schemas
from serving.batching import MicroBatcher
from serving.embedder import Embedder
from serving.errors import ApiError
from serving.fetching import ImageFetcher, NotFetchedError
from serving.model_source import Model
from serving.searcher import Searcher
from serving.telemetry import stage

Read = TypeVar("Read")

NO_INDEX = "this server has no index; start it with index=DIRECTORY"


class Operations:
    """Embeds, searches and classifies with one model, and the index that was made with it."""

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
        self._searcher = searcher
        self._transform, self._tokenizer = checkpoint.transform, checkpoint.tokenizer
        self._tokenizer.model_max_length = model.context_length
        self._logit_scale = float(checkpoint.model.logit_scale.exp())
        # Not asyncio's own pool: that has many more threads than there are cores, and would take them from the model.
        self._readers = ThreadPoolExecutor(torch.get_num_threads(), "reader")
        self._free_readers = asyncio.Semaphore(torch.get_num_threads())

    @property
    def index_info(self) -> schemas.IndexInfo | None:
        """The index that is searched; None where there is none."""
        return None if self._searcher is None else self._searcher.info

    @property
    def searcher(self) -> Searcher:
        """The index; raises `ApiError` where there is none."""
        if self._searcher is None:
            raise ApiError(404, NO_INDEX, "index_not_found")
        return self._searcher

    async def embed(self, request: schemas.EmbeddingsRequest) -> schemas.EmbeddingsResponse:
        """Unit-length embeddings of texts and images, in the order of the input."""
        self._check_model(request.model)
        if request.dimensions not in (None, self.model_info.embedding_dim):
            raise ApiError(
                422,
                f"dimensions: the model's vectors have {self.model_info.embedding_dim}, not {request.dimensions}; they"
                " were not trained to be cut",
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
        """The items of the index that are nearest to a text, an image, an item or a vector.

        Args:
            request: what to search for.
            prefix: path under which the API is reached, for the addresses of thumbnails.
        """
        start = time.perf_counter()
        searcher, query = self.searcher, request.query
        tokens, truncated, itself = 0, 0, None
        if query.id is not None:
            itself = query.id
            found = await searcher.vector(query.id, request.target)
            if found is None:
                raise unknown_id("query.id")
            vector = found
        elif query.embedding is not None:
            vector = self._read_vector(query.embedding)
        else:
            item = schemas.Item(text=query.text, image=query.image)
            vectors, tokens, truncated = await self._embed_items([item], request.truncate, "query")
            vector = vectors[0]
        top_k = request.top_k + (itself is not None)
        with stage("search"):
            matches = await searcher.search(vector, top_k, request.target, request.filter, request.exact)
        matches = [match for match in matches if match.id != itself][: request.top_k]
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
        """Zero-shot: how well each label describes each item, by the mean embedding of the label's prompts."""
        self._check_model(request.model)
        prompts = class_prompts(request.labels, request.templates)
        if len(prompts) > inputs.MAX_TEXTS:
            message = f"labels: {len(prompts)} prompts (labels x templates), at most {inputs.MAX_TEXTS} are allowed"
            raise ApiError(413, message, "too_many_items", "labels")
        params = [f"labels[{row // len(request.templates)}]" for row in range(len(prompts))]
        tokens, _ = await self._read_texts(prompts, params, truncate=False)
        (vectors, read, truncated), labels = await asyncio.gather(
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
            usage=schemas.Usage(prompt_tokens=read, total_tokens=read, truncated=truncated),
        )

    async def count_tokens(self, text: str) -> int:
        """Tokens of a text without any limit, start and end token included."""
        return await self._reading(inputs.token_count, self._tokenizer, text)

    async def not_ready(self) -> list[str]:
        """Why requests cannot be answered at the moment; nothing where they can."""
        reasons = []
        for name, check in (("model", self.embedder.check), ("index", self._searcher and self._searcher.check)):
            try:
                if check:
                    await check()
            except Exception as error:  # whatever it is, requests would meet it too
                reasons.append(f"{name}: {type(error).__name__}")
        return reasons

    def _check_model(self, model: str | None) -> None:
        info = self.model_info
        if model not in (None, info.id, f"{info.id}/{info.version}"):
            raise ApiError(404, f"model: this server has only '{info.id}'", "model_not_found", "model")

    async def _embed_items(
        self, items: Sequence[schemas.Item], truncate: bool, name: str = "input"
    ) -> tuple[np.ndarray, int, int]:
        """Embeddings `[N, E]` of items, tokens read, and texts that were cut."""
        params = [f"{name}[{row}]" if name == "input" else f"{name}.{item.kind}" for row, item in enumerate(items)]
        texts = [row for row, item in enumerate(items) if item.text is not None]
        images = [row for row, item in enumerate(items) if item.image is not None]
        for kind, rows, limit in (("texts", texts, inputs.MAX_TEXTS), ("images", images, inputs.MAX_IMAGES)):
            if len(rows) > limit:
                message = f"{name}: {len(rows)} {kind}, at most {limit} are allowed in one request"
                raise ApiError(413, message, "too_many_items", name)
        # Everything is read before anything is embedded: an item that cannot be read costs no run of the model.
        batch, truncated = None, 0
        if texts:
            batch, truncated = await self._read_texts(
                [items[row].text or "" for row in texts], [params[row] for row in texts], truncate
            )
        pixels = await asyncio.gather(*(self._read_image(items[row].image or "", params[row]) for row in images))
        calls: list[Awaitable[np.ndarray]] = []
        if batch is not None:
            calls.append(self.embedder.embed_texts(batch))
        if pixels:
            calls.append(self.embedder.embed_images(np.stack(pixels)))
        vectors = np.empty((len(items), self.model_info.embedding_dim), np.float32)
        with stage("embed"):
            vectors[texts + images] = np.concatenate(await asyncio.gather(*calls))
        return vectors, 0 if batch is None else int(batch.lengths.sum()), truncated

    async def _read_texts(self, texts: list[str], params: list[str], truncate: bool) -> tuple[TokenBatch, int]:
        arguments = (self._tokenizer, texts, params, truncate)
        return await self._reading(inputs.read_texts, *arguments, queue=self.embedder.texts)

    async def _read_image(self, image: str, param: str) -> np.ndarray:
        if self._fetcher is None or image[:8].lower() != "https://":
            arguments = (self._transform, image, param)
            return await self._reading(inputs.read_image, *arguments, queue=self.embedder.images)
        try:
            with stage("fetch"):
                data = await self._fetcher.fetch(image)
        except NotFetchedError:
            message = f"{param}: not an allowed address of an image of at most {inputs.MAX_IMAGE_BYTES} bytes"
            raise ApiError(422, message, "image_not_fetched", param) from None
        return await self._reading(inputs.image_pixels, self._transform, data, param)

    async def _reading(
        self, read: Callable[..., Read], *arguments: Any, queue: MicroBatcher[Any, Any] | None = None
    ) -> Read:
        with stage("read"):
            async with self._free_readers:
                if queue:  # reading is work, too: what the model has no time for is refused before it
                    queue.admit()
                return await asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)

    def _read_vector(self, values: list[float]) -> np.ndarray:
        param = "query.embedding"
        if len(values) != self.model_info.embedding_dim:
            message = f"{param}: {len(values)} numbers, the model's vectors have {self.model_info.embedding_dim}"
            raise ApiError(422, message, "invalid_value", param)
        vector = np.array(values, np.float64)
        length = np.linalg.norm(vector)
        if not 0 < length < np.inf:
            raise ApiError(
                422, f"{param}: the vector's length is {length}, it has no direction", "invalid_value", param
            )
        return (vector / length).astype(np.float32)


def unknown_id(param: str) -> ApiError:
    """The index lacks an item that a request names."""
    return ApiError(404, f"{param}: the index has no such item", "id_not_found", param)


def _as_numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


def _as_base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients ask for it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _hit(match: Match, prefix: str) -> schemas.Hit:
    return schemas.Hit(
        id=match.id,
        score=match.score,
        caption=match.caption,
        metadata=match.metadata,
        thumbnail_url=f"{prefix}/v1/thumbnails/{quote(match.id, safe='')}",
    )
