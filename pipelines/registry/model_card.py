"""The model card of a registered version: its origin, benchmark results and limits."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from longclip.checkpoint import MANIFEST, checkpoint_id

LIMITS = """\
- Texts of more than {context_length} tokens are cut, or refused where the caller asks for that.
- Its embeddings compare with those of checkpoint `{checkpoint_id}` only, never with those of another model.
- It has learned what its base and its captions say, with their mistakes and prejudices, in their language. It is not
  meant to identify people, nor to decide about them.
- A figure above holds for its set and its number of candidates; more candidates make every recall smaller."""


def model_card(name: str, checkpoint: Path, measured: Sequence[str]) -> str:
    """A card in Markdown.

    Args:
        name: registered model.
        checkpoint: checkpoint directory.
        measured: a section in Markdown for each task that it was measured on.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    metadata, context_length = manifest.get("metadata", {}), manifest["context_length"]
    settings = metadata.get("settings") or {}
    identity = checkpoint_id(checkpoint)
    facts = {
        "checkpoint": f"`{identity}`",
        "reads": f"{context_length} tokens of text",
        "embeddings": f"{manifest['embedding_dim']} numbers, unit length, cosine similarity",
        "base": f"`{settings['model']['base']}`" if settings.get("model", {}).get("base") else "trained from scratch",
        "data": f"`{settings['input']}`" if settings.get("input") else "not recorded",
    }
    parts = [f"# {name}", "An image-text model of the CLIP family that reads long text (Long-CLIP, arXiv 2403.15378)."]
    parts.append("\n".join(f"- {fact}: {value}" for fact, value in facts.items()))
    parts.append("## Measured")
    parts += measured or ["Nothing was measured when it was registered."]
    parts += ["## Limits", LIMITS.format(context_length=context_length, checkpoint_id=identity)]
    if metadata:
        parts += ["## Recipe", f"```yaml\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n```"]
    return "\n\n".join(parts) + "\n"
