"""The HTTP API and the web page. Independent of Ray Serve: it runs under any ASGI server."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.requests import Request
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from serving import limits, schemas
from serving.errors import install_handlers
from serving.middleware import Admission, ApiKeys, BodyLimit, BrowserHeaders, CancelOnDisconnect
from serving.operations import Operations, unknown_id

WEB = Path(__file__).resolve().parent / "web"
EXAMPLE_COUNT = 4


def create_api(
    operations: Operations,
    key_digests: frozenset[str] = frozenset(),
    export_metrics: Callable[[], Awaitable[str]] | None = None,
) -> FastAPI:
    """The FastAPI application.

    Args:
        operations: computes the responses.
        key_digests: SHA-256 of the accepted API keys, hexadecimal; if empty, no key is required.
        export_metrics: returns the text of `GET /metrics`; None omits this route.
    """
    # FastAPI's interactive pages load scripts from another host, which the content security policy forbids.
    api = FastAPI(title="Long-CLIP", docs_url=None, redoc_url=None)
    # The last one added is the outermost: requests without a key do not count as admitted, and every response gets
    # the browser headers.
    api.add_middleware(BodyLimit, max_bytes=limits.MAX_BODY_BYTES, seconds=limits.BODY_SECONDS)
    api.add_middleware(CancelOnDisconnect)
    api.add_middleware(
        Admission,
        max_requests=limits.MAX_REQUESTS,
        max_bytes=limits.MAX_BYTES_IN_FLIGHT,
        default_bytes=limits.MAX_BODY_BYTES,
    )
    api.add_middleware(ApiKeys, digests=key_digests)
    api.add_middleware(BrowserHeaders)
    install_handlers(api)
    api.mount("/static", StaticFiles(directory=WEB), name="static")

    @api.post("/v1/embeddings")
    async def embeddings(request: schemas.EmbeddingsRequest) -> schemas.EmbeddingsResponse:
        """Unit-length embeddings of texts and images, in input order."""
        return await operations.embed(request)

    @api.post("/v1/search")
    async def search(http: Request, request: schemas.SearchRequest) -> schemas.SearchResponse:
        """The items of the index nearest to a text, an image, an item or a vector."""
        return await operations.search(request, http.scope.get("root_path", ""))

    @api.post("/v1/classify")
    async def classify(request: schemas.ClassifyRequest) -> schemas.ClassifyResponse:
        """Zero-shot classification of texts and images with the given labels."""
        return await operations.classify(request)

    @api.get("/v1/thumbnails/{id:path}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def thumbnail(id: str) -> Response:
        """The thumbnail of an indexed item."""
        data = await operations.searcher.thumbnail(id)
        if data is None:
            raise unknown_id("id")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    @api.post("/v1/tokenize")
    async def tokenize(request: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        """Number of tokens of a text."""
        tokens = await operations.count_tokens(request.text)
        return schemas.TokenizeResponse(tokens=tokens, context_length=operations.model_info.context_length)

    @api.get("/v1/examples")
    async def examples() -> schemas.Examples:
        """A few captions of the index as example queries; empty without an index."""
        captions = [] if operations.index_info is None else await operations.searcher.examples(EXAMPLE_COUNT)
        return schemas.Examples(examples=captions)

    @api.get("/v1/models")
    async def models() -> schemas.ModelList:
        """The served model."""
        model = operations.model_info
        entry = schemas.ModelEntry(
            id=model.id, version=model.version, checkpoint_id=model.checkpoint_id, lineage=operations.lineage
        )
        return schemas.ModelList(data=[entry])

    @api.get("/info")
    async def info() -> schemas.Info:
        """The model, the index, and the limits of a request."""
        return schemas.Info(model=operations.model_info, index=operations.index_info, limits=limits.REQUEST_LIMITS)

    @api.get("/healthz")
    async def healthz() -> schemas.Status:
        """Whether this process responds."""
        return schemas.Status(status="ok")

    @api.get("/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}})
    async def readyz() -> JSONResponse:
        """Whether the model and the index, if any, work: 200, or 503 with the reasons."""
        reasons = await operations.not_ready()
        if reasons:
            return JSONResponse({"status": "not ready", "reasons": reasons}, 503)
        return JSONResponse({"status": "ready", "reasons": []})

    if export_metrics is not None:

        @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
        async def metrics() -> Response:
            """Metrics of all replicas in Prometheus text format."""
            return Response(await export_metrics(), media_type="text/plain; version=0.0.4")

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """The web page."""
        return FileResponse(WEB / "index.html")

    return api
