"""CLIP's byte-pair tokenizer: lengths, reported truncation, and an end token in every text."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from transformers import CLIPTokenizer

if TYPE_CHECKING:  # processes that only count tokens do not load torch
    from torch import Tensor

MERGES = "clip_bpe_merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of N texts, padded with 0 after the end token to the longest text."""

    input_ids: "Tensor"
    """`[N, L]` int64."""
    lengths: "Tensor"
    """`[N]` int64 number of tokens of each text, including start and end token, at most the context length."""
    full_lengths: "Tensor"
    """`[N]` int64 number of tokens of each text before truncation; more than `lengths` if it was cut."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def build_tokenizer(context_length: int) -> CLIPTokenizer:
    """The tokenizer of OpenAI's CLIP (49,408 tokens), built from the merges that ship with this package.

    Args:
        context_length: becomes `model_max_length`: 77 for plain CLIP, 248 for Long-CLIP.
    """
    text = gzip.decompress(resources.files("longclip").joinpath("assets", MERGES).read_bytes()).decode("utf-8")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in text.splitlines())]
    symbols = _byte_symbols()
    vocabulary = symbols + [f"{symbol}</w>" for symbol in symbols] + [left + right for left, right in merges]
    vocabulary += [START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=context_length,
    )


@lru_cache(maxsize=4)
def load_tokenizer(source: str | None, context_length: int) -> CLIPTokenizer:
    """The tokenizer of a checkpoint (directory or hub name), or the packaged one if `source` is None or has none."""
    if source is None:
        return build_tokenizer(context_length)
    tokenizer = CLIPTokenizer.from_pretrained(source)
    # Without tokenizer files, transformers returns one that knows its special tokens only.
    if len(tokenizer) == len(set(tokenizer.all_special_tokens)):
        return build_tokenizer(context_length)
    tokenizer.model_max_length = context_length
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], context_length: int | None = None) -> TokenBatch:
    """Tokenize texts; long ones are cut before their end token.

    Args:
        tokenizer: a CLIP tokenizer.
        texts: N texts, at least one.
        context_length: maximum tokens per text; None means the tokenizer's `model_max_length`.
    """
    import torch

    limit = context_length or tokenizer.model_max_length
    encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    full_lengths = torch.tensor([len(ids) for ids in encoded])
    lengths = full_lengths.clamp(max=limit)
    input_ids = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(encoded):
        kept = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        input_ids[row, : len(kept)] = torch.tensor(kept)
    return TokenBatch(input_ids, lengths, full_lengths)


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Concatenate batches, padded with 0 to their longest text."""
    import torch
    from torch.nn.functional import pad

    longest = max(batch.input_ids.shape[1] for batch in batches)
    return TokenBatch(
        torch.cat([pad(batch.input_ids, (0, longest - batch.input_ids.shape[1])) for batch in batches]),
        torch.cat([batch.lengths for batch in batches]),
        torch.cat([batch.full_lengths for batch in batches]),
    )


def count_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[int]:
    """Number of tokens of each text without truncation, including start and end token."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]]


def _byte_symbols() -> list[str]:
    """The 256 printable symbols that stand for bytes in a GPT-2 style vocabulary, in the order of their token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]
