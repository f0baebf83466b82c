"""The HTTP side: reads requests, calls the deployments, writes responses."""

import asyncio
import base64
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Response
from fastapi.requests import Request
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import CLIPTokenizer

from longclip.tokenizer import TokenBatch
from serving import inputs, schemas
from serving.artifacts import Model, fetch
from serving.embedder import IMAGES_PER_CALL, TEXTS_PER_CALL
from serving.errors import ApiError, install_handlers
from serving.index import Manifest, Match
from serving.middleware import BodyLimit, BrowserHeaders

WEB = Path(__file__).resolve().parent / "web"
EXAMPLES = 4
READY_TIMEOUT_S = 2.0
NO_INDEX = "this server has no index; start it with index=DIRECTORY"

# The interactive pages of FastAPI load scripts from elsewhere, which the content security policy forbids.
api = FastAPI(title="Long-CLIP", docs_url=None, redoc_url=None)
api.add_middleware(BodyLimit, max_bytes=inputs.MAX_BODY_BYTES)
api.add_middleware(BrowserHeaders)
install_handlers(api)
api.mount("/static", StaticFiles(directory=WEB), name="static")


def _unknown_id(param: str) -> ApiError:
    return ApiError(404, f"{param}: the index has no such item", "id_not_found", param)


def _as_numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


def _as_base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients ask for it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


# Serve freezes the routes at this decorator, with the names they use: what is defined below it does not exist for them.
@serve.ingress(api)
class Ingress:
    """The HTTP API and the web page.

    It also makes texts to tokens and images to pixels: that takes CPU, and here it scales apart from the model.
    """

    def __init__(
        self,
        model: Model,
        manifest: Manifest | None,
        embedder: DeploymentHandle,
        retriever: DeploymentHandle | None,
    ) -> None:
        self._model = model
        self._embedder = embedder
        self._retriever_or_none = retriever
        self._tokenizer = CLIPTokenizer.from_pretrained(fetch(model))
        self._tokenizer.model_max_length = model.context_length
        self._model_info = schemas.ModelInfo(
            id=model.location.name,
            version=model.version,
            checkpoint_id=model.checkpoint_id,
            context_length=model.context_length,
            embedding_dim=model.embedding_dim,
            image_size=model.transform.image_size,
        )
        self._index_info = None if manifest is None else schemas.IndexInfo.model_validate(manifest)

    @api.post("/v1/embeddings")
    async def embeddings(self, request: schemas.EmbeddingsRequest) -> schemas.EmbeddingsResponse:
        """Unit-length embeddings of texts and images, in the order of the input."""
        self._check_embeddings_request(request)
        items = request.input
        texts = [row for row, item in enumerate(items) if item.text is not None]
        images = [row for row, item in enumerate(items) if item.image is not None]
        tokens, truncated = 0, 0
        calls = []
        if texts:
            batch, truncated = await self._read_texts(
                [items[row].text or "" for row in texts], [f"input[{row}]" for row in texts], request.truncate
            )
            tokens = int(batch.lengths.sum())
            calls.append(self._embed_texts(batch))
        if images:
            pixels = await asyncio.to_thread(
                inputs.read_images,
                self._model.transform,
                [items[row].image or "" for row in images],
                [f"input[{row}]" for row in images],
            )
            calls.append(self._embed_images(pixels))
        vectors = np.empty((len(items), self._model.embedding_dim), np.float32)
        vectors[texts + images] = np.concatenate(await asyncio.gather(*calls))
        encode = _as_base64 if request.encoding_format == "base64" else _as_numbers
        return schemas.EmbeddingsResponse(
            model=self._model_info.id,
            data=[schemas.Embedding(index=row, embedding=encode(vector)) for row, vector in enumerate(vectors)],
            usage=schemas.Usage(prompt_tokens=tokens, total_tokens=tokens, truncated=truncated),
        )

    @api.post("/v1/search")
    async def search(self, http: Request, request: schemas.SearchRequest) -> schemas.SearchResponse:
        """The items of the index that are nearest to a text, an image, an item or a vector."""
        start = time.perf_counter()
        retriever, index = self._retriever, self._index_info
        assert index is not None
        query = request.query
        tokens, truncated = 0, 0
        matches: list[Match] | None
        if query.id is not None:
            matches = await retriever.search_like.remote(query.id, request.top_k)
            if matches is None:
                raise _unknown_id("query.id")
        else:
            if query.text is not None:
                batch, truncated = await self._read_texts([query.text], ["query.text"], request.truncate)
                tokens = int(batch.lengths.sum())
                vector = (await self._embed_texts(batch))[0]
            elif query.image is not None:
                pixels = await asyncio.to_thread(
                    inputs.read_images, self._model.transform, [query.image], ["query.image"]
                )
                vector = (await self._embed_images(pixels))[0]
            else:
                vector = self._read_vector(query.embedding or [])
            matches = await retriever.search.remote(vector, request.top_k)
        prefix = http.scope.get("root_path", "")
        hits = [
            schemas.Hit(
                id=match.id,
                score=match.score,
                caption=match.caption,
                thumbnail_url=f"{prefix}/v1/thumbnails/{quote(match.id, safe='')}",
            )
            for match in matches
        ]
        return schemas.SearchResponse(
            hits=hits,
            model=self._model_info,
            index=index,
            tokens=tokens,
            truncated=truncated > 0,
            took_ms=round((time.perf_counter() - start) * 1000, 2),
        )

    @api.get("/v1/thumbnails/{id:path}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def thumbnail(self, id: str) -> Response:
        """The thumbnail of an item."""
        data = await self._retriever.thumbnail.remote(id)
        if data is None:
            raise _unknown_id("id")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    @api.post("/v1/tokenize")
    async def tokenize(self, request: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        """How many tokens a text has."""
        tokens = await asyncio.to_thread(inputs.token_count, self._tokenizer, request.text)
        return schemas.TokenizeResponse(tokens=tokens, context_length=self._model.context_length)

    @api.get("/v1/examples")
    async def examples(self) -> schemas.Examples:
        """A few captions of the index, to start from; none without an index."""
        if self._retriever_or_none is None:
            return schemas.Examples(examples=[])
        return schemas.Examples(examples=await self._retriever.examples.remote(EXAMPLES))

    @api.get("/v1/models")
    async def models(self) -> schemas.ModelList:
        """The one model that is served."""
        return schemas.ModelList(data=[schemas.ModelEntry(id=self._model_info.id, version=self._model_info.version)])

    @api.get("/info")
    async def info(self) -> schemas.Info:
        """The model, the index, and the limits of a request."""
        return schemas.Info(model=self._model_info, index=self._index_info, limits=inputs.LIMITS)

    @api.get("/healthz")
    async def healthz(self) -> schemas.Status:
        """Whether this process answers."""
        return schemas.Status(status="ok")

    @api.get("/readyz", response_model=schemas.Status)
    async def readyz(self) -> JSONResponse:
        """Whether the model, and the index where there is one, answer: 200 or 503."""
        handles = [handle for handle in (self._embedder, self._retriever_or_none) if handle is not None]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for handle in handles:
                    await handle.ready.remote()
        except Exception:  # whatever it is, the server is not ready
            return JSONResponse({"status": "not ready"}, 503)
        return JSONResponse({"status": "ready"})

    @api.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        """The web page."""
        return FileResponse(WEB / "index.html")

    @property
    def _retriever(self) -> DeploymentHandle:
        if self._retriever_or_none is None:
            raise ApiError(404, NO_INDEX, "index_not_found")
        return self._retriever_or_none

    def _check_embeddings_request(self, request: schemas.EmbeddingsRequest) -> None:
        info = self._model_info
        if request.model not in (None, info.id, f"{info.id}/{info.version}"):
            raise ApiError(404, f"model: this server has only '{info.id}'", "model_not_found", "model")
        if request.dimensions not in (None, info.embedding_dim):
            message = f"dimensions: the model's vectors have {info.embedding_dim}, not {request.dimensions}"
            raise ApiError(422, message, "invalid_value", "dimensions")
        images = sum(item.image is not None for item in request.input)
        for kind, count, limit in (
            ("texts", len(request.input) - images, inputs.MAX_TEXTS),
            ("images", images, inputs.MAX_IMAGES),
        ):
            if count > limit:
                message = f"input: {count} {kind}, at most {limit} are allowed in one request"
                raise ApiError(413, message, "too_many_items", "input")

    async def _read_texts(self, texts: list[str], params: list[str], truncate: bool) -> tuple[TokenBatch, int]:
        return await asyncio.to_thread(inputs.read_texts, self._tokenizer, texts, params, truncate)

    async def _embed_texts(self, batch: TokenBatch) -> np.ndarray:
        """Embeddings `[N, E]` of a batch of any size."""
        rows = [slice(start, start + TEXTS_PER_CALL) for start in range(0, len(batch), TEXTS_PER_CALL)]
        parts = [TokenBatch(batch.input_ids[part], batch.lengths[part], batch.full_lengths[part]) for part in rows]
        return np.concatenate(await asyncio.gather(*(self._embedder.embed_texts.remote(part) for part in parts)))

    async def _embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings `[N, E]` of pixels `[N, S, S, 3]`."""
        parts = [pixels[start : start + IMAGES_PER_CALL] for start in range(0, len(pixels), IMAGES_PER_CALL)]
        return np.concatenate(await asyncio.gather(*(self._embedder.embed_images.remote(part) for part in parts)))

    def _read_vector(self, values: list[float]) -> np.ndarray:
        param = "query.embedding"
        if len(values) != self._model.embedding_dim:
            message = f"{param}: {len(values)} numbers, the model's vectors have {self._model.embedding_dim}"
            raise ApiError(422, message, "invalid_value", param)
        vector = np.array(values, np.float64)
        length = np.linalg.norm(vector)
        if not 0 < length < np.inf:
            raise ApiError(
                422, f"{param}: the vector's length is {length}, it has no direction", "invalid_value", param
            )
        return (vector / length).astype(np.float32)
