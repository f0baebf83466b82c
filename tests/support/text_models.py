"""Small untrained language models with the real architectures, as directories."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "a the red blue bus dog cat beach boat sky is on in waits runs near summarize : . system user answer".split()  # noqa: SIM905
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
VOCABULARY_SIZE = len(SPECIAL) + len(WORDS)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and strict %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.role }} : {{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(end: bool, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of some words; `end` closes each text with its end token, as T5 and BART have it."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = template
    return made


def saved(directory: Path, config: Any, kind: Any, its_tokenizer: Any) -> str:
    """An untrained model as a directory; its weights are large enough for its answers to depend on what it reads."""
    torch.manual_seed(0)
    model = kind.from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.6 if "embed" not in name and "shared" not in name else 1.0)
    if model.can_generate():  # words, not padding
        model.generation_config.suppress_tokens = [0, 2, 3]
    model.save_pretrained(directory)
    its_tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder-decoder without an end to its positions."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return saved(tmp_path_factory.mktemp("t5"), config, transformers.AutoModelForSeq2SeqLM, tokenizer(end=True))


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder-decoder of 24 learned positions."""
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in BART_SIZES.items()}
    config = transformers.BartConfig(
        vocab_size=VOCABULARY_SIZE,
        d_model=32,
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        **sizes,
    )
    return saved(tmp_path_factory.mktemp("bart"), config, transformers.AutoModelForSeq2SeqLM, tokenizer(end=True))


BART_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model of 64 positions, whose published way to answer is to draw at random."""
    config = transformers.LlamaConfig(vocab_size=VOCABULARY_SIZE, max_position_embeddings=64, **SMALL)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 3
    directory = tmp_path_factory.mktemp("llama")
    source = saved(directory, config, transformers.AutoModelForCausalLM, tokenizer(end=False, template=TEMPLATE))
    transformers.GenerationConfig(do_sample=True, temperature=2.0, top_p=0.9, eos_token_id=1).save_pretrained(directory)
    return source
