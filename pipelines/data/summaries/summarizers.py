"""Short texts for long captions, by any strategy: what a job over a Parquet needs to know of them.

    check_strategies(settings)                                                in the process that starts the job
    summarize = load_summarizer(strategy, settings)                           once in each worker
    texts = summarize(captions, keys)
    texts, sources, replaced = checked_summaries(strategy, texts, captions, settings.checks)

Strategy vllm has no summarizer: its model belongs to engines that Ray Data runs, see `pipelines.data.summaries.vllm`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from longclip.text import summaries as model_free
from longclip.text.summary_checks import clean_summary, summary_problem
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.data.summaries.endpoint import EndpointSummaries
from pipelines.data.summaries.language_models import ChatSummaries, Seq2SeqSummaries
from pipelines.data.summaries.sentence_embedding import EmbeddingSummaries
from pipelines.data.summaries.settings import GENERATED, MODEL_FREE, Checks, SummarySettings

CONTEXT_LENGTH = 248
"""Of the tokenizer that counts tokens; it counts all, however many."""


class Summarizer(Protocol):
    """Writes summaries. Whatever it loads, it has loaded when it is made."""

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption; keys (ids of rows) seed what is drawn at random."""


class OneByOne:
    """A summarizer of `longclip.text.summaries`."""

    def __init__(self, strategy: str) -> None:
        self.summarize = model_free.summarizer(strategy)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption."""
        return [self.summarize(caption, key) for caption, key in zip(captions, keys, strict=True)]


def load_summarizer(strategy: str, settings: SummarySettings) -> Summarizer:
    """The summarizer of a strategy, with its model: on a GPU in bfloat16 where there is one, else in float32.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the model, its prompt and its limits do not go together, or a package is missing.
        ValueError: the strategy has no summarizer.
    """
    if strategy in MODEL_FREE:
        return OneByOne(strategy)
    if strategy == "extractive_embedding":
        return EmbeddingSummaries(settings.embedding)
    if strategy == "seq2seq":
        return Seq2SeqSummaries(settings.seq2seq)
    if strategy == "chat":
        return ChatSummaries(settings.chat)
    if strategy == "endpoint":
        return EndpointSummaries(settings.endpoint)
    raise ValueError(f"strategy '{strategy}' has no summarizer")


def checked_summaries(
    strategy: str, texts: Sequence[str], captions: Sequence[str], checks: Checks
) -> tuple[list[str], list[str], Counter[str]]:
    """Summaries that stand for their captions, the strategy that each came from, and why others were replaced.

    What a model wrote is cleaned and checked; where it fails, the extractive summary takes its place.

    Args:
        strategy: what made the texts.
        texts: N summaries as they were made.
        captions: N texts, see `longclip.text.sentences.caption_text`.
        checks: when a summary fails.

    Returns:
        N summaries, N names of strategies, and counts by `strategy: reason`.
    """
    if strategy not in GENERATED or not texts:
        return list(texts), [strategy] * len(texts), Counter()
    summaries = [clean_summary(text) for text in texts]
    sources = [strategy] * len(summaries)
    replaced: Counter[str] = Counter()
    tokens = count_tokens(load_tokenizer(None, CONTEXT_LENGTH), summaries)
    for index, caption in enumerate(captions):
        problem = summary_problem(summaries[index], caption, tokens[index], **checks.model_dump())
        if problem:
            summaries[index], sources[index] = model_free.extractive(caption, key=""), "extractive"
            replaced[f"{strategy}: {problem}"] += 1
    return summaries, sources, replaced
