"""Summaries by a language model in the worker: encoder-decoders and chat models."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from longclip.errors import ConfigError
from pipelines.data.model_loading import in_batches, load_model, model_source, reading
from pipelines.data.summaries.settings import Chat, Seq2Seq

SPARE_TOKENS = 8
"""A caption within its prompt can have a few more tokens than both have separately."""


class LanguageModelSummaries:
    """Summaries by a model that generates text from a prompt."""

    kind: Any
    """Auto class of the model."""
    padding_side: str

    def __init__(self, strategy: str, settings: Seq2Seq | Chat) -> None:
        """
        Args:
            strategy: name of the group of settings, for messages.
            settings: model and prompt.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: the prompt alone exceeds `max_input_tokens` or the positions of the model.
        """
        self.batch_size, self.max_new_tokens, self.num_beams = settings.batch_size, settings.max_new_tokens, 1
        source = model_source(f"{strategy}.model", settings.model or "")
        with reading(f"{strategy}.model", source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        if self.tokenizer.pad_token is None:  # common, and harmless: masks hide the padding
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_model(self.kind, f"{strategy}.model", source)
        positions = self.prompt_positions()
        budget = settings.max_input_tokens if positions is None else min(settings.max_input_tokens, positions)
        empty = len(self.encode([""])[0])
        self.caption_tokens = budget - empty - SPARE_TOKENS
        if self.caption_tokens < 1:
            raise ConfigError(
                f"{strategy}.prompt has {empty} tokens without the caption, which leave no room for one within"
                f" {budget}; shorten it, raise {strategy}.max_input_tokens, or use a model with more positions"
            )

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption."""
        if not captions:
            return []
        prompts = self.encode([truncated(self.tokenizer, caption, self.caption_tokens) for caption in captions])
        return in_batches(prompts, self.batch_size, len, self._generate)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of the prompt for each caption."""
        raise NotImplementedError

    def prompt_positions(self) -> int | None:
        """Maximum number of tokens in a prompt by the positions of the model; None if unlimited."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]]) -> list[str]:
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side=self.padding_side, return_tensors="pt")
        tokens = self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            attention_mask=inputs["attention_mask"].to(self.model.device),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            do_sample=False,
            # Greedy decoding ignores the sampling defaults of a model, but warns about them.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # remove the prompt
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


class Seq2SeqSummaries(LanguageModelSummaries):
    """Summaries by an encoder-decoder."""

    kind, padding_side = AutoModelForSeq2SeqLM, "right"

    def __init__(self, settings: Seq2Seq) -> None:
        self.settings = settings
        super().__init__("seq2seq", settings)
        self.num_beams = settings.num_beams

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of the encoder's prompt for each caption."""
        return self.tokenizer([self.settings.filled(caption) for caption in captions])["input_ids"]


class ChatSummaries(LanguageModelSummaries):
    """Summaries by a causal language model with a chat template."""

    # Generation continues the prompt, so padding must be on the other side.
    kind, padding_side = AutoModelForCausalLM, "left"

    def __init__(self, settings: Chat) -> None:
        self.settings = settings
        super().__init__("chat", settings)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of the conversation for each caption."""
        conversations = [self.settings.messages(caption) for caption in captions]
        texts = chat_texts(self.tokenizer, conversations, self.settings.template_options)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has added them

    def prompt_positions(self) -> int | None:
        """Positions of the model without those of the generated text."""
        positions = super().prompt_positions()
        return None if positions is None else positions - self.max_new_tokens


def chat_texts(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], options: dict[str, Any]) -> list[str]:
    """Conversations as text, up to the start of the model's reply."""
    return [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        for messages in conversations
    ]


def truncated(tokenizer: Any, caption: str, max_tokens: int) -> str:
    """A caption cut to `max_tokens` tokens of a model; unchanged if it is short enough."""
    tokens = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
    return caption if len(tokens) <= max_tokens else tokenizer.decode(tokens[:max_tokens], skip_special_tokens=True)
