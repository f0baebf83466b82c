"""Settings of `caption.py`: strategies, prompt, checks, limits, input and output.

Imports neither Ray nor torch: `--help` needs this module.
"""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from pipelines.common.chat_endpoint import EndpointSettings
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers
from pipelines.data.settings import ImageLimits
from pipelines.data.sources.settings import CAPTION_NAMES, SourceSettings
from pipelines.data.vllm_settings import VllmEngine

Strategy = Literal["endpoint", "vllm", "transformers"]
COLUMNS = ("id", "image", "caption", "short_caption", "caption_source")
"""Columns of the output, without those of source.keep."""

EXAMPLES = {
    "endpoint": "the name of a model on the server",
    "vllm": "a directory, hub name or URI",
    "transformers": "a directory or hub name",
}


class Endpoint(EndpointSettings):
    """A vision-language model on an OpenAI-compatible server."""

    max_new_tokens: PositiveInt = 512
    """Maximum number of tokens (of the model's tokenizer) in a reply."""
    timeout_seconds: float = Field(120.0, gt=0)
    """Seconds without a byte from the server after which an attempt fails."""
    attempts: PositiveInt = 8
    """Maximum number of attempts per request, two minutes of pauses in all; retried are lost connections, timeouts, 429
    and 5xx."""


class Vllm(VllmEngine):
    """A vision-language model run by vLLM, through ray.data.llm."""

    max_new_tokens: PositiveInt = 512
    """Maximum number of tokens (of the model's tokenizer) in a reply."""


class Transformers(Settings):
    """A vision-language model with a chat template, run by transformers with greedy decoding."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    max_new_tokens: PositiveInt = 512
    """Maximum number of tokens (of the model's tokenizer) in a reply."""
    batch_size: PositiveInt = 8
    """Images per batch."""


class ImageSettings(ImageLimits):
    """What the model is shown; the output has the image files unchanged."""

    max_side: int = Field(1024, ge=32)
    """Longest side: larger images are reduced. Most models charge by area."""
    jpeg_quality: int = Field(90, ge=30, le=100)
    """Quality of the JPEG that is sent."""


class Price(Settings):
    """Price of a million tokens, in any currency; the cost is reported if either is set."""

    input: NonNegativeFloat = 0.0
    """Tokens of prompts and images."""
    output: NonNegativeFloat = 0.0
    """Tokens of replies."""


class Checks(Settings):
    """Which replies become captions. Tokens are CLIP's, start and end token included."""

    min_tokens: int = Field(100, ge=3)
    """A shorter caption is too short."""
    max_tokens: int = Field(230, ge=3, le=LONG_CLIP_CONTEXT_LENGTH)
    """A longer caption is cut at the end of a sentence; if Long-CLIP could not read it either (248 tokens), the model
    is first asked for a shorter one."""
    language: str = "English"
    """Language of the captions, in English: `German`. CLIP's tokenizer is made for English."""
    attempts: PositiveInt = 3
    """Maximum number of replies per image: a reply that fails a check is sent back with the reason."""

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> Self:
        if self.min_tokens >= self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is not below max_tokens={self.max_tokens}; lower the first or raise the"
                " second"
            )
        return self


class CaptionSettings(Settings):
    """All settings of the job."""

    input: str
    """File, directory or URI of images, with or without captions; source.format lists the supported layouts."""
    output: str
    """Directory or URI of the captioned Parquet."""
    source: SourceSettings = SourceSettings()
    strategy: Strategy = "endpoint"
    """What runs the model: endpoint (an OpenAI-compatible server), vllm (engines on this cluster's GPUs) or
    transformers (in the workers)."""
    endpoint: Endpoint = Endpoint()
    vllm: Vllm = Vllm()
    transformers: Transformers = Transformers()
    prompt: str = "describe"
    """Packaged prompt, describe or expand (which gives the model the short caption), or path of a text file.
    {min_words}, {max_words}, {language}, {caption} (the existing one) and the columns of source.keep are filled in; a
    line is left out where its column is empty."""
    image: ImageSettings = ImageSettings()
    checks: Checks = Checks()
    limit: PositiveInt | None = None
    """Caption only the first rows of the source, for a trial."""
    max_total_tokens: PositiveInt | None = None
    """Stop when prompts and replies, those of earlier runs included, have used this many tokens. The job ends with exit
    code 8; with a higher number the same command resumes it. Requests in flight may exceed it."""
    price_per_million: Price = Price()
    workers: Workers = Workers()
    """Processes that send requests (each with endpoint.concurrency in flight) or load a model, or vLLM engines."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """Maximum share of rows without a usable image or caption before the job fails."""
    overwrite: bool = False
    """Replace an existing output, or unfinished work, that was made with other settings or data."""
    storage: Storage = Storage()

    @property
    def model(self) -> str:
        """The model of the strategy."""
        return getattr(self, self.strategy).model or ""

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in a reply."""
        return getattr(self, self.strategy).max_new_tokens

    @model_validator(mode="after")
    def _strategy_has_a_model(self) -> Self:
        if not self.model:
            raise ValueError(
                f"strategy {self.strategy} needs a model; set {self.strategy}.model to {EXAMPLES[self.strategy]}"
            )
        if self.strategy == "endpoint" and not self.endpoint.url:
            raise ValueError("strategy endpoint needs a server; set endpoint.url, e.g. http://localhost:8000/v1")
        return self

    @model_validator(mode="after")
    def _kept_columns_have_other_names(self) -> Self:
        preferred = CAPTION_NAMES[: CAPTION_NAMES.index("caption")]
        for name in self.source.keep:
            if name in COLUMNS:
                raise ValueError(f"source.keep='{name}' is a column of the output ({', '.join(COLUMNS)}); remove it")
            if name in preferred:
                raise ValueError(
                    f"source.keep='{name}': prepare would read this column instead of the new caption; remove it,"
                    " or give it as source.caption, which keeps it as short_caption"
                )
        return self


NOT_IN_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("output", "storage", "overwrite", "max_rejected_fraction", "workers"), True),
    **dict.fromkeys(("max_total_tokens", "price_per_million", "prompt"), True),
    "endpoint": {"url", "concurrency", "timeout_seconds", "attempts"},
}
"""Settings that do not affect the content of the output: a rerun that changes them continues the same work. Of the
prompt its text counts."""
