"""Zero-shot classification: a class is the mean embedding of its name in many sentences (CLIP, section 3.1.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longclip.checkpoint import Checkpoint
from longclip.encode import encode_text, unit
from longclip.tokenizer import tokenize

PROMPTS_AT_ONCE = 1024


@torch.inference_mode()
def class_embeddings(checkpoint: Checkpoint, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embeddings of classes: the mean of the unit embeddings of all prompts, scaled to unit length.

    Args:
        checkpoint: the model.
        class_names: C names.
        templates: sentences with `{}` for the name.

    Returns:
        `[C, D]` unit length, float32.
    """
    prompts = class_prompts(class_names, templates)
    parts = [
        unit(encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, prompts[start : start + PROMPTS_AT_ONCE])))
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return class_means(torch.cat(parts), len(class_names)).cpu()


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts of C classes and T templates, class by class: C x T."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def class_means(embeddings: Tensor, classes: int) -> Tensor:
    """Unit-length embeddings `[C, D]` of classes, from those of all their prompts `[C x T, D]`, class by class."""
    return unit(embeddings.unflatten(0, (classes, -1)).mean(1))
