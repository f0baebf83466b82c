"""Summarizers of all strategies, and the checks of what they write.

    check_strategies(settings)                                                in the process that starts the job
    summarize = load_summarizer(strategy, settings)                           once in each worker
    texts = summarize(captions, keys)
    texts, sources, replaced = checked_summaries(strategy, texts, captions, settings.checks)

Strategy vllm has no summarizer: Ray Data runs its engines, see `pipelines.data.summaries.vllm`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.text import summaries as model_free
from longclip.text.summary_checks import clean_summary, summary_problem
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.data.summaries.endpoint import EndpointSummaries
from pipelines.data.summaries.settings import GENERATED, MODEL_FREE, Checks, SummarySettings


class Summarizer(Protocol):
    """Writes summaries. Models are loaded when it is created."""

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption; keys (row ids) seed random choices."""


class ModelFreeSummaries:
    """Summaries by a strategy of `longclip.text.summaries`."""

    def __init__(self, strategy: str) -> None:
        self.summarize = model_free.summarizer(strategy)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption."""
        return [self.summarize(caption, key) for caption, key in zip(captions, keys, strict=True)]


def load_summarizer(strategy: str, settings: SummarySettings) -> Summarizer:
    """Load the summarizer of a strategy, with its model: in bfloat16 on a GPU if there is one, else in float32.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the prompt does not fit the limits of the model, or a package is missing.
        ValueError: the strategy has no summarizer.
    """
    if strategy in MODEL_FREE:
        return ModelFreeSummaries(strategy)
    if strategy == "endpoint":
        return EndpointSummaries(settings.endpoint)
    # Only these need torch.
    from pipelines.data.summaries.language_models import ChatSummaries, Seq2SeqSummaries
    from pipelines.data.summaries.sentence_embedding import EmbeddingSummaries

    if strategy == "extractive_embedding":
        return EmbeddingSummaries(settings.embedding)
    if strategy == "seq2seq":
        return Seq2SeqSummaries(settings.seq2seq)
    if strategy == "chat":
        return ChatSummaries(settings.chat)
    raise ValueError(f"strategy '{strategy}' has no summarizer")


def checked_summaries(
    strategy: str, texts: Sequence[str], captions: Sequence[str], checks: Checks
) -> tuple[list[str], list[str], Counter[str]]:
    """Clean and check summaries written by a model; replace those that fail by extractive ones.

    Args:
        strategy: strategy that wrote the texts; those of a strategy without generation are returned unchanged.
        texts: N summaries.
        captions: N texts, see `longclip.text.sentences.caption_text`.
        checks: limits of the checks.

    Returns:
        N summaries, the N strategies that they are from, and the number of replacements by `strategy: reason`.
    """
    if strategy not in GENERATED or not texts:
        return list(texts), [strategy] * len(texts), Counter()
    summaries = [clean_summary(text) for text in texts]
    sources = [strategy] * len(summaries)
    replaced: Counter[str] = Counter()
    tokens = count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), summaries)
    for index, caption in enumerate(captions):
        problem = summary_problem(summaries[index], caption, tokens[index], **checks.model_dump())
        if problem:
            summaries[index], sources[index] = model_free.extractive(caption, key=""), "extractive"
            replaced[f"{strategy}: {problem}"] += 1
    return summaries, sources, replaced
