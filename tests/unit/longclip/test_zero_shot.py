"""Class embeddings against the plain computation."""

import pytest
import torch
from torch.nn.functional import normalize

from longclip import zero_shot
from longclip.checkpoint import Checkpoint
from longclip.encode import encode_text
from longclip.tokenizer import tokenize
from longclip.zero_shot import class_embeddings

NAMES = ["cat", "tree frog", "plane {with braces}"]
TEMPLATES = ["a photo of a {}.", "{}", "a {} in the snow, and much more of it."]


def test_every_prompt_has_equal_weight(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for name in NAMES:
        prompts = [f"a photo of a {name}.", name, f"a {name} in the snow, and much more of it."]
        with torch.inference_mode():
            features = encode_text(tiny_checkpoint.model, tokenize(tiny_checkpoint.tokenizer, prompts))
        expected.append(normalize(normalize(features, dim=1).mean(0), dim=0))
    for prompts_at_once in (1024, 2):
        monkeypatch.setattr(zero_shot, "PROMPTS_AT_ONCE", prompts_at_once)
        found = class_embeddings(tiny_checkpoint, NAMES, TEMPLATES)
        torch.testing.assert_close(found, torch.stack(expected))
