"""Requests and responses of the HTTP API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

MAX_TOP_K = 100


class Request(BaseModel):
    """Base of every request: a misspelt field is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


class Item(Request):
    """One thing to embed: a text or an image."""

    text: str | None = None
    image: str | None = Field(None, description="data URI or raw base64 of an image file")

    @model_validator(mode="after")
    def _one_kind(self) -> "Item":
        if (self.text is None) == (self.image is None):
            raise ValueError("give exactly one of 'text' and 'image'")
        return self


def _as_items(value: Any) -> Any:
    """A string, a list of strings or a list of items -> a list of items."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"text": element} if isinstance(element, str) else element for element in value]


class EmbeddingsRequest(Request):
    """`POST /v1/embeddings`: OpenAI's request, with images and explicit truncation."""

    input: Annotated[
        list[Item],
        BeforeValidator(_as_items, json_schema_input_type=str | list[str | Item]),
        Field(min_length=1),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="accepted where it is the model's own")
    user: str | None = Field(None, description="accepted for OpenAI clients, not used")
    truncate: bool = Field(False, description="cut texts that are too long instead of refusing them")


class Embedding(BaseModel):
    """One unit-length vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read; `truncated` counts the texts that were cut."""

    prompt_tokens: int
    total_tokens: int
    truncated: int


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the input."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class Query(Request):
    """What to search for: exactly one of the four."""

    text: str | None = None
    image: str | None = Field(None, description="data URI or raw base64 of an image file")
    id: str | None = Field(None, description="an item of the index; it is not among its own hits")
    embedding: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Query":
        given = [value for value in (self.text, self.image, self.id, self.embedding) if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'text', 'image', 'id' and 'embedding', not {len(given)}")
        return self


class SearchRequest(Request):
    """`POST /v1/search`."""

    query: Query
    top_k: int = Field(10, ge=1, le=MAX_TOP_K)
    truncate: bool = Field(False, description="cut a text that is too long instead of refusing it")


class Hit(BaseModel):
    """One item of the index; `score` is its cosine similarity with the query."""

    id: str
    score: float
    caption: str
    thumbnail_url: str


class ModelInfo(BaseModel):
    """The model that is served."""

    id: str
    version: str
    checkpoint_id: str
    context_length: int
    embedding_dim: int
    image_size: int


class IndexInfo(BaseModel):
    """The index that is searched."""

    model_config = ConfigDict(from_attributes=True)

    checkpoint_id: str
    count: int
    embedding_dim: int
    source: str
    created: str


class SearchResponse(BaseModel):
    """Hits, best first. `tokens` is 0 where the query was no text."""

    hits: list[Hit]
    model: ModelInfo
    index: IndexInfo
    tokens: int
    truncated: bool
    took_ms: float


class Info(BaseModel):
    """`GET /info`."""

    model: ModelInfo
    index: IndexInfo | None
    limits: dict[str, int]


class TokenizeRequest(Request):
    """`POST /v1/tokenize`."""

    text: str


class TokenizeResponse(BaseModel):
    """Tokens of a text, start and end token included, and how many the model reads."""

    tokens: int
    context_length: int


class ModelEntry(BaseModel):
    """A model as OpenAI's clients list it."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["longclip"] = "longclip"
    version: str


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Examples(BaseModel):
    """`GET /v1/examples`: captions of the index, to start from."""

    examples: list[str]


class Status(BaseModel):
    """`GET /healthz` and `GET /readyz`."""

    status: str
