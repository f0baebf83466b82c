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
    """Embeddings of classes: every prompt's is made unit length, then their mean is.

    Args:
        checkpoint: the model.
        class_names: C names.
        templates: sentences in which `{}` stands for the name.

    Returns:
        `[C, D]` unit length, float32.
    """
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    parts = [
        unit(encode_text(checkpoint.model, tokenize(checkpoint.tokenizer, prompts[start : start + PROMPTS_AT_ONCE])))
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return unit(torch.cat(parts).unflatten(0, (len(class_names), len(templates))).mean(1)).cpu()
