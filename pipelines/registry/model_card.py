"""The model card of a registered version: where it comes from, what it was measured at, what it cannot do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from longclip.checkpoint import MANIFEST, checkpoint_id
from pipelines.evaluation.report import tables

LIMITS = """\
- Texts of more than {context_length} tokens are cut, or refused where the caller asks for that.
- Its embeddings compare with those of checkpoint `{checkpoint_id}` only, never with those of another model.
- It has learned what its base and its captions say, with their mistakes and prejudices, in their language. It is not
  meant to identify people, nor to decide about them.
- A figure above holds for its set and its number of candidates; more candidates make every recall smaller."""


def model_card(name: str, checkpoint: Path, results: Sequence[dict[str, Any]], model: str | None) -> str:
    """A card in Markdown.

    Args:
        name: registered model.
        checkpoint: checkpoint directory.
        results: results of tasks, as `benchmark` writes one JSON each.
        model: name of this checkpoint in the results; the last one where None.
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
    parts += [_measured(result, model) for result in results] or ["Nothing was measured when it was registered."]
    parts += ["## Limits", LIMITS.format(context_length=context_length, checkpoint_id=identity)]
    if metadata:
        parts += ["## Recipe", f"```yaml\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _measured(result: dict[str, Any], model: str | None) -> str:
    """The first table of a task, of this model alone."""
    name = model or list(result["models"])[-1]
    alone = result | {"models": {name: result["models"][name]}, "comparisons": [], "paper_figures": []}
    table = next(tables(alone))
    return f"### {result['task']}: {result['protocol']}\n\n{table.markdown()}"
