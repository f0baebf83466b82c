"""Summaries that a language model on this machine writes: encoder-decoders, and chat models."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from longclip.errors import ConfigError
from pipelines.data.summaries.model_loading import in_batches, load_model, model_source, reading
from pipelines.data.summaries.settings import Chat, Seq2Seq

SPARE_TOKENS = 8
"""A caption inside its prompt can have some tokens more than both have apart."""


class LanguageModelSummaries:
    """Summaries by a model that answers prompts."""

    kind: Any
    """Auto class of the model."""
    padding_side: str

    def __init__(self, strategy: str, settings: Seq2Seq | Chat) -> None:
        """
        Args:
            strategy: name of the group of settings, for messages.
            settings: the model, and what it is asked.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: the prompt alone is longer than `max_input_tokens` or than the model reads.
        """
        self.batch_size, self.max_new_tokens, self.num_beams = settings.batch_size, settings.max_new_tokens, 1
        source = model_source(f"{strategy}.model", settings.model or "")
        with reading(f"{strategy}.model", source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        if self.tokenizer.pad_token is None:  # many were never trained with padding, and masks hide whatever it is
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_model(self.kind, f"{strategy}.model", source)
        reads = self.reads()
        budget = settings.max_input_tokens if reads is None else min(settings.max_input_tokens, reads)
        empty = len(self.encode([""])[0])
        self.caption_tokens = budget - empty - SPARE_TOKENS
        if self.caption_tokens < 1:
            raise ConfigError(
                f"{strategy}.prompt: {empty} tokens without the caption leave no room for it among {budget};"
                f" shorten it, raise {strategy}.max_input_tokens, or take a model that reads more"
            )

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption."""
        if not captions:
            return []
        prompts = self.encode([shortened(self.tokenizer, caption, self.caption_tokens) for caption in captions])
        return in_batches(prompts, self.batch_size, len, self._answer)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of the prompt for each caption."""
        raise NotImplementedError

    def reads(self) -> int | None:
        """Most tokens of a prompt that the model's positions have room for, or None where they have no end."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]]) -> list[str]:
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side=self.padding_side, return_tensors="pt")
        tokens = self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            attention_mask=inputs["attention_mask"].to(self.model.device),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            # What a published chat model samples with has no meaning here, and would only be warned of.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # it repeats the prompt
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


class Seq2SeqSummaries(LanguageModelSummaries):
    """Summaries by an encoder-decoder."""

    kind, padding_side = AutoModelForSeq2SeqLM, "right"

    def __init__(self, settings: Seq2Seq) -> None:
        self.settings = settings
        super().__init__("seq2seq", settings)
        self.num_beams = settings.num_beams

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens that the encoder reads for each caption."""
        return self.tokenizer([self.settings.filled(caption) for caption in captions])["input_ids"]


class ChatSummaries(LanguageModelSummaries):
    """Summaries by a causal language model with a chat template."""

    # An answer continues where its prompt ends, so no padding may stand there.
    kind, padding_side = AutoModelForCausalLM, "left"

    def __init__(self, settings: Chat) -> None:
        self.settings = settings
        super().__init__("chat", settings)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of the conversation about each caption."""
        conversations = [self.settings.messages(caption) for caption in captions]
        texts = chat_texts(self.tokenizer, conversations, self.settings.template_options)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has put them in

    def reads(self) -> int | None:
        """Positions that the answer leaves for a prompt."""
        positions = super().reads()
        return None if positions is None else positions - self.max_new_tokens


def chat_texts(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], options: dict[str, Any]) -> list[str]:
    """Conversations as the model reads them, up to where its answer begins."""
    return [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        for messages in conversations
    ]


def shortened(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """A caption without what is more than some tokens of a model; unchanged where it is short enough."""
    tokens = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
    return caption if len(tokens) <= max_tokens else tokenizer.decode(tokens[:max_tokens], skip_special_tokens=True)
