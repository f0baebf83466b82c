"""Tokens: equal to the official ones, cut in front of the end token, and never silently."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from longclip.tokenizer import build_tokenizer, count_tokens, tokenize

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(248)


def test_parity_with_the_official_tokenizer(tokenizer: CLIPTokenizer, vectors: Path) -> None:
    texts = json.loads((vectors / "official_longclip_tiny.json").read_text())["texts"]
    expected = load_file(vectors / "official_longclip_tiny.safetensors")["text_ids"]
    batch = tokenize(tokenizer, texts)
    assert batch.input_ids.shape == expected.shape
    assert torch.equal(batch.input_ids, expected.long())


def test_known_ids(tokenizer: CLIPTokenizer) -> None:
    # From OpenAI's CLIP: the ids of its README's example, and a text that is lower-cased and cleaned.
    assert tokenize(tokenizer, ["a diagram"]).input_ids.tolist() == [[START, 320, 22697, END]]
    assert torch.equal(tokenize(tokenizer, ["A  DIAGRAM \n"]).input_ids, tokenize(tokenizer, ["a diagram"]).input_ids)
    assert len(tokenizer) == 49408


@pytest.mark.parametrize("words", [245, 246, 247, 400])
def test_truncation_keeps_the_end_token(tokenizer: CLIPTokenizer, words: int) -> None:
    batch = tokenize(tokenizer, ["word " * words, "short"])
    assert batch.input_ids.shape == (2, min(words + 2, 248))
    assert batch.input_ids.dtype == torch.int64
    assert batch.lengths.tolist() == [min(words + 2, 248), 3]
    assert batch.full_lengths.tolist() == [words + 2, 3]
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row].tolist()
        assert (ids[0], ids[length - 1]) == (START, END)
        assert ids.count(END) == 1
        assert set(ids[length:]) <= {0}


def test_a_smaller_limit_wins(tokenizer: CLIPTokenizer) -> None:
    batch = tokenize(tokenizer, ["one two three four five six"], context_length=5)
    whole = tokenize(tokenizer, ["one two three four five six"])
    assert batch.input_ids.tolist() == [[*whole.input_ids[0, :4].tolist(), END]]
    assert batch.full_lengths.tolist() == whole.lengths.tolist() == [8]


def test_every_byte_has_a_token(tokenizer: CLIPTokenizer) -> None:
    for text in ("", " ", "naïve café", "日本語の長い説明", "🐕‍🦺 🏔", "\x00\x01", "a\u00a0b", "'s <|endoftext|>x"):
        batch = tokenize(tokenizer, [text])
        assert batch.input_ids[0, 0] == START
        assert batch.input_ids[0, -1] == END
        assert int(batch.input_ids.max()) < 49408


def test_counting_agrees_with_tokenizing(tokenizer: CLIPTokenizer) -> None:
    texts = ["a", "word " * 300, "Two dogs, one ball."]
    assert count_tokens(tokenizer, texts) == tokenize(tokenizer, texts).full_lengths.tolist() == [3, 302, 8]
    assert len(tokenize(tokenizer, texts)) == 3
