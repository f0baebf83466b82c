"""Requests and responses of the HTTP API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from longclip.lineage import Lineage

MAX_TOP_K = 100


class Request(BaseModel):
    """Base of all requests: unknown fields are errors."""

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

    @property
    def kind(self) -> Literal["text", "image"]:
        """Kind of the item."""
        return "image" if self.text is None else "text"


def _as_items(value: Any) -> Any:
    """Convert a string, a list of strings or a list of items to a list of items."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"text": element} if isinstance(element, str) else element for element in value]


Items = Annotated[
    list[Item],
    BeforeValidator(_as_items, json_schema_input_type=str | list[str | Item]),
    Field(min_length=1),
]


class EmbeddingsRequest(Request):
    """`POST /v1/embeddings`: OpenAI's request plus images and explicit truncation."""

    input: Items
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="accepted only if equal to that of the model")
    user: str | None = Field(None, description="accepted for OpenAI clients, not used")
    truncate: bool = Field(False, description="truncate texts that are too long instead of refusing them")


class Embedding(BaseModel):
    """One unit-length vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Number of tokens processed; `truncated` is the number of truncated texts."""

    prompt_tokens: int
    total_tokens: int
    truncated: int


class EmbeddingsResponse(BaseModel):
    """Vectors in input order."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class Query(Request):
    """What to search for: exactly one of the four fields."""

    text: str | None = None
    image: str | None = Field(None, description="data URI or raw base64 of an image file")
    id: str | None = Field(None, description="an item of the index; it is left out of the hits")
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
    target: Literal["image", "caption"] = Field("image", description="compare with the images or with their captions")
    top_k: int = Field(10, ge=1, le=MAX_TOP_K)
    min_score: FiniteFloat | None = Field(None, description="minimum score of a hit")
    filter: dict[str, Any] | None = Field(None, description="conditions on the metadata of items")
    exact: bool = Field(False, description="compare with every item, even if the index is approximate")
    truncate: bool = Field(False, description="truncate a text that is too long instead of refusing it")


class Hit(BaseModel):
    """One item of the index; `score` is its cosine similarity with the query."""

    id: str
    score: float
    caption: str
    metadata: dict[str, Any]
    thumbnail_url: str


class ModelInfo(BaseModel):
    """The served model."""

    id: str
    version: str
    checkpoint_id: str
    context_length: int
    embedding_dim: int
    image_size: int
    precision: str
    """Precision of matrix products: float32 or bfloat16."""


class IndexInfo(BaseModel):
    """The searched index."""

    version: int
    checkpoint_id: str
    count: int
    embedding_dim: int
    engine: str
    targets: list[str]
    """What queries can be compared with: image, caption."""
    metadata: dict[str, str]
    """Columns that filters can use, and their types."""
    source: str
    created: str


class SearchResponse(BaseModel):
    """Hits, best first. `tokens` is 0 if the query was not a text."""

    hits: list[Hit]
    model: ModelInfo
    index: IndexInfo
    tokens: int
    truncated: bool
    took_ms: float


class ClassifyRequest(Request):
    """`POST /v1/classify`."""

    input: Items
    labels: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2, max_length=1000)
    templates: list[Annotated[str, Field(pattern=r"\{\}")]] = Field(
        ["a photo of a {}."], min_length=1, max_length=100, description="prompts; {} is replaced by the label"
    )
    top_k: int | None = Field(None, ge=1, description="return only the best labels of each item")
    model: str | None = None
    truncate: bool = Field(False, description="truncate input texts that are too long instead of refusing them")


class LabelScore(BaseModel):
    """A label for an item: its cosine similarity, and its softmax probability over all labels."""

    label: str
    score: float
    probability: float


class Classification(BaseModel):
    """The labels of one item, best first."""

    index: int
    labels: list[LabelScore]


class ClassifyResponse(BaseModel):
    """Labels of each item, in input order."""

    object: Literal["list"] = "list"
    model: str
    data: list[Classification]
    usage: Usage


class Info(BaseModel):
    """`GET /info`."""

    model: ModelInfo
    index: IndexInfo | None
    limits: dict[str, int]


class TokenizeRequest(Request):
    """`POST /v1/tokenize`."""

    text: str


class TokenizeResponse(BaseModel):
    """Number of tokens of a text, including the start and end tokens, and the model's maximum."""

    tokens: int
    context_length: int


class ModelEntry(BaseModel):
    """A model in the format of OpenAI's API, and the ids that its manifest and its model card show."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["longclip"] = "longclip"
    version: str
    checkpoint_id: str
    lineage: Lineage


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Examples(BaseModel):
    """`GET /v1/examples`: captions of the index as example queries."""

    examples: list[str]


class Status(BaseModel):
    """`GET /healthz`."""

    status: str


class Readiness(Status):
    """`GET /readyz`; `reasons` is empty if the application is ready."""

    reasons: list[str]
