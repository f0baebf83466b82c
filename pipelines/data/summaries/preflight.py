"""Checks before a job starts: missing packages, and models that a strategy cannot use."""

from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from longclip.errors import CheckpointError, ConfigError, one_line
from pipelines.data.model_loading import model_source, reading
from pipelines.data.summaries.language_models import chat_texts
from pipelines.data.summaries.sentence_embedding import embedding_source
from pipelines.data.summaries.settings import Chat, Seq2Seq, SummarySettings, Vllm


def check_strategies(settings: SummarySettings) -> None:
    """Check the models and packages of the selected strategies without loading weights.

    Raises:
        CheckpointError: a model does not exist, has no safetensors weights, or does not suit its strategy.
        ConfigError: a package is missing, or vLLM does not know an argument of its engine.
    """
    for strategy in settings.strategies:
        if strategy == "extractive_embedding":
            embedding_source(settings.embedding)
        elif strategy == "seq2seq":
            _check_seq2seq(settings.seq2seq)
        elif strategy == "chat":
            _check_chat(settings.chat)
        elif strategy == "vllm":
            _check_vllm(settings.vllm)


def _check_seq2seq(settings: Seq2Seq) -> None:
    source = model_source("seq2seq.model", settings.model or "")
    with reading("seq2seq.model", source):
        config = AutoConfig.from_pretrained(source)
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"seq2seq.model='{settings.model}' is a '{config.model_type}' model, not an encoder-decoder such as"
                " T5 or BART; a chat model is for strategy chat"
            )
        AutoTokenizer.from_pretrained(source)


def _check_chat(settings: Chat) -> None:
    source = model_source("chat.model", settings.model or "")
    with reading("chat.model", source):
        config = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"chat.model='{settings.model}' is a '{config.model_type}' model, not a causal language model such as"
                " Llama or Qwen; an encoder-decoder is for strategy seq2seq"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.chat_template:
        raise CheckpointError(f"chat.model='{settings.model}' has no chat template; give an instruction-tuned model")
    _check_template("chat", tokenizer, settings)


def _check_vllm(settings: Vllm) -> None:
    # They import ray.data.llm, which takes seconds.
    from pipelines.data.summaries.vllm import INSTEAD
    from pipelines.data.vllm_engine import vllm_config

    source = vllm_config(settings, 1, INSTEAD).model_source
    if "://" in source:
        return
    with reading("vllm.model", source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template:  # a multimodal model has it in its processor
        _check_template("vllm", tokenizer, settings)


def _check_template(strategy: str, tokenizer: Any, settings: Chat | Vllm) -> None:
    try:
        chat_texts(tokenizer, [settings.messages("A caption.")], settings.template_options)
    except Exception as error:  # a template can raise any exception
        reason = one_line(error, 200)
        raise ConfigError(
            f"{strategy}.model='{settings.model}': its chat template rejects the conversation: {reason}; set"
            f" {strategy}.system to an empty text if it has no system role, and check {strategy}.template_options"
        ) from error
