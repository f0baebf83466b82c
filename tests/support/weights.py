"""Weights in OpenAI's layout, comparing weights, and conversions that must fail."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from longclip.checkpoint import Checkpoint
from longclip.convert import main

State = dict[str, Tensor]
WIDTH, DIM = 32, 24


def openai_state(context_length: int = 77, vision_width: int = WIDTH, seed: int = 0) -> State:
    """Random weights in OpenAI's layout: one layer per tower, 16-pixel images in patches of 8."""
    draw = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.05

    def block(prefix: str, width: int) -> State:
        return {
            f"{prefix}.attn.in_proj_weight": weight(3 * width, width),
            f"{prefix}.attn.in_proj_bias": weight(3 * width),
            f"{prefix}.attn.out_proj.weight": weight(width, width),
            f"{prefix}.attn.out_proj.bias": weight(width),
            f"{prefix}.ln_1.weight": 1 + weight(width),
            f"{prefix}.ln_1.bias": weight(width),
            f"{prefix}.ln_2.weight": 1 + weight(width),
            f"{prefix}.ln_2.bias": weight(width),
            f"{prefix}.mlp.c_fc.weight": weight(2 * width, width),
            f"{prefix}.mlp.c_fc.bias": weight(2 * width),
            f"{prefix}.mlp.c_proj.weight": weight(width, 2 * width),
            f"{prefix}.mlp.c_proj.bias": weight(width),
        }

    return {
        "positional_embedding": weight(context_length, WIDTH),
        "text_projection": weight(WIDTH, DIM),
        "logit_scale": torch.tensor(3.0),
        "token_embedding.weight": weight(49408, WIDTH),
        "ln_final.weight": 1 + weight(WIDTH),
        "ln_final.bias": weight(WIDTH),
        "visual.class_embedding": weight(vision_width),
        "visual.positional_embedding": weight(5, vision_width),
        "visual.proj": weight(vision_width, DIM),
        "visual.conv1.weight": weight(vision_width, 3, 8, 8),
        "visual.ln_pre.weight": 1 + weight(vision_width),
        "visual.ln_pre.bias": weight(vision_width),
        "visual.ln_post.weight": 1 + weight(vision_width),
        "visual.ln_post.bias": weight(vision_width),
        **block("transformer.resblocks.0", WIDTH),
        **block("visual.transformer.resblocks.0", vision_width),
    }


def same_weights(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> bool:
    actual = checkpoint.model.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and the one error line of a conversion that must fail."""
    capsys.readouterr()  # what preparing the source printed, such as progress bars of transformers
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return status, captured.err
