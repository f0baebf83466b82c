"""Encoding texts and images without wasted work.

A CLIP text feature is read at the end token, and attention is causal: whatever is padded behind it changes nothing. So
texts are encoded in length-sorted micro-batches, each cut to its own longest text, and without an attention mask, which
would only take the fast attention kernels away.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from longclip.tokenizer import TokenBatch

TEXT_MICRO_BATCH = 32


def encode_text(model: CLIPModel, tokens: TokenBatch, micro_batch_size: int = TEXT_MICRO_BATCH) -> Tensor:
    """Text features of a batch, in its order.

    Args:
        model: a CLIP with at least as many positions as the longest text.
        tokens: N texts, each ending with the end token.
        micro_batch_size: texts that run through the model at once.

    Returns:
        `[N, D]` features before normalisation. Equal to encoding with full padding up to rounding.
    """
    order = torch.argsort(tokens.lengths, stable=True)
    features = []
    for rows in order.split(micro_batch_size):
        longest = int(tokens.lengths[rows].max())
        input_ids = tokens.input_ids[rows, :longest].to(model.device)
        features.append(model.get_text_features(input_ids=input_ids).pooler_output)
    return torch.cat(features)[torch.argsort(order).to(model.device)]


def encode_image(model: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Image features `[N, D]` before normalisation of normalised `pixel_values [N, 3, S, S]`."""
    return model.get_image_features(pixel_values=pixel_values.to(model.device)).pooler_output


def unit(features: Tensor) -> Tensor:
    """Features `[N, D]` scaled to unit length, in float32 or better."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
