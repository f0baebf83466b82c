"""Encode texts and images without wasted work.

A CLIP text feature is read at the end token, and attention is causal, so padding after it changes nothing. Texts are
therefore encoded in length-sorted micro-batches, each cut to its longest text, without a padding mask, which would
disable the fast attention kernels. An image feature is read at the class token. In the last layer of each tower only
one row is needed, so its queries, output and MLP are computed for that row alone.

All of this is exact: equal to the full computation up to rounding.

With `checkpoint_layers`, autograd keeps only the input of each layer and recomputes the rest in backward (arXiv
1604.06174): less memory for one more forward pass of these layers.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from longclip.tokenizer import TokenBatch

TEXT_MICRO_BATCH = 32


def encode_text(model: CLIPModel, tokens: TokenBatch, micro_batch_size: int = TEXT_MICRO_BATCH) -> Tensor:
    """Text features of a batch, in its order.

    Args:
        model: a CLIP with at least as many positions as the longest text.
        tokens: N texts, each ending with the end token.
        micro_batch_size: texts per forward pass.

    Returns:
        `[N, D]` features before normalisation. Equal to encoding with full padding up to rounding.
    """
    micro_batches = text_micro_batches(tokens, micro_batch_size)
    features = torch.cat([encode_micro_batch(model, tokens, rows) for rows in micro_batches])
    return features[inverse_order(micro_batches).to(features.device)]


def text_micro_batches(tokens: TokenBatch, size: int = TEXT_MICRO_BATCH) -> Sequence[Tensor]:
    """Rows of a batch in micro-batches of at most `size` texts of similar length, short ones first."""
    return torch.argsort(tokens.lengths, stable=True).split(size)


def inverse_order(micro_batches: Sequence[Tensor]) -> Tensor:
    """Position of each row of the batch in its concatenated micro-batches, `[N]`."""
    return torch.argsort(torch.cat(list(micro_batches)))


def encode_micro_batch(model: CLIPModel, tokens: TokenBatch, rows: Tensor, checkpoint_layers: bool = False) -> Tensor:
    """Text features `[n, D]` before normalisation of the rows `[n]` of a batch, cut to the longest of them."""
    lengths = tokens.lengths[rows]
    input_ids = tokens.input_ids[rows, : int(lengths.max())].to(model.device, non_blocking=True)
    tower = model.text_model
    hidden = tower.embeddings(input_ids=input_ids)
    mask = create_causal_mask(config=tower.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
    *layers, last = tower.encoder.layers
    for layer in layers:
        hidden = _whole(partial(layer, is_causal=True), hidden, mask, checkpoint_layers)
    ends = (lengths - 1).to(hidden.device, non_blocking=True)
    return model.text_projection(tower.final_layer_norm(_layer_at(last, hidden, ends, causal=True)))


def encode_image(model: CLIPModel, pixel_values: Tensor, checkpoint_layers: bool = False) -> Tensor:
    """Image features `[N, D]` before normalisation of normalised `pixel_values [N, 3, S, S]`."""
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(model.device)))
    *layers, last = tower.encoder.layers
    for layer in layers:
        hidden = _whole(layer, hidden, None, checkpoint_layers)
    classes = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return model.visual_projection(tower.post_layernorm(_layer_at(last, hidden, classes, causal=False)))


def _whole(layer: Callable[..., Tensor], hidden: Tensor, mask: Tensor | None, recompute: bool) -> Tensor:
    """Output of an encoder layer for `hidden [n, L, W]`, recomputed in backward if asked for."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, hidden, mask, use_reentrant=False)
    return layer(hidden, mask)


def _layer_at(layer: CLIPEncoderLayer, hidden: Tensor, rows: Tensor, causal: bool) -> Tensor:
    """Output `[n, W]` of an encoder layer for `hidden [n, L, W]` at one row of each sequence, `rows [n]`."""
    attention, sequences = layer.self_attn, torch.arange(len(hidden), device=hidden.device)
    normed = layer.layer_norm1(hidden)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)  # [n, heads, ., d]

    # Rows after a text's end are padding.
    seen = torch.arange(hidden.shape[1], device=hidden.device) <= rows[:, None] if causal else None
    attended = scaled_dot_product_attention(
        heads(attention.q_proj(normed[sequences, rows].unsqueeze(1))),
        heads(attention.k_proj(normed)),
        heads(attention.v_proj(normed)),
        attn_mask=seen[:, None, None] if seen is not None else None,
        dropout_p=attention.dropout if attention.training else 0.0,
        scale=attention.scale,
    )
    pooled = hidden[sequences, rows] + attention.out_proj(attended.flatten(1))
    return pooled + layer.mlp(layer.layer_norm2(pooled))


def unit(features: Tensor) -> Tensor:
    """Features `[N, D]` scaled to unit length, in float32 or better."""
    return normalize(at_least_float32(features), dim=-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision converted to float32; float64 stays float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
