"""The model card of a registered version: origin, measured figures, promotion and limits, as Markdown."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from longclip.files import MANIFEST
from longclip.lineage import KEY, read_lineage, read_metadata

NOT_RECORDED = "not recorded"
MEASURED, PROMOTION, LIMITS, RECIPE = "Measured", "Promotion", "Limits", "Recipe"
NOTHING_MEASURED = "Nothing was measured when it was registered."
MAX_DESCRIPTION = 5000
"""Characters that the databases of MLflow keep of a version's description."""

LIMITS_TEXT = """\
- Texts of more than {context_length} tokens are cut, or refused where the caller asks for that.
- Its embeddings compare with those of checkpoint `{checkpoint_id}` only, never with those of another model.
- It has learned what its base and its captions say, with their mistakes and prejudices, in their language. It is not
  meant to identify people, nor to decide about them.
- A figure above holds for its set and its number of candidates; more candidates make every recall smaller."""


def model_card(
    name: str, checkpoint: Path, checkpoint_id: str, measured: Sequence[str], source_is_training: bool
) -> str:
    """A card in Markdown.

    Args:
        name: registered model.
        checkpoint: checkpoint directory.
        checkpoint_id: its id.
        measured: a section in Markdown for each task that it was measured on.
        source_is_training: whether the source run of the version is the run that trained the checkpoint.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    facts = {
        "checkpoint": f"`{checkpoint_id}`",
        "reads": f"{manifest['context_length']} tokens of text",
        "embeddings": f"{manifest['embedding_dim']} numbers, unit length, cosine similarity",
        **_origin(checkpoint, source_is_training),
    }
    parts = [f"# {name}", "An image-text model of the CLIP family that reads long text (Long-CLIP, arXiv 2403.15378)."]
    parts.append("\n".join(f"- {fact}: {value}" for fact, value in facts.items()))
    parts += [f"## {MEASURED}", *(measured or [NOTHING_MEASURED])]
    parts += [
        f"## {LIMITS}",
        LIMITS_TEXT.format(context_length=manifest["context_length"], checkpoint_id=checkpoint_id),
    ]
    recipe = {key: value for key, value in read_metadata(checkpoint).items() if key != KEY}
    if recipe:
        parts += [f"## {RECIPE}", f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _origin(checkpoint: Path, source_is_training: bool) -> dict[str, str]:
    lineage, metadata = read_lineage(checkpoint), read_metadata(checkpoint)
    settings = metadata.get("settings") or {}
    if lineage.run_id is None:
        run = f"{NOT_RECORDED}; the source run of this version is its registration"
    elif source_is_training:
        run = f"`{lineage.run_id}`, the source run of this version"
    else:
        run = f"`{lineage.run_id}`, not on this tracking server; the source run of this version is its registration"
    data = [f"`{settings['input']}`"] if settings.get("input") else []
    data += [f"digest `{lineage.data_digest}` of its {lineage.data_digest_of}"] if lineage.data_digest else []
    base = f"`{lineage.base or (settings.get('model') or {}).get('base')}`"
    if lineage.base_checkpoint_id:
        base += f", checkpoint `{lineage.base_checkpoint_id}`"
    if lineage.base_run_id:
        base += f", trained by run `{lineage.base_run_id}`"
    if base == "`None`":
        source, from_scratch = metadata.get("source"), (settings.get("model") or {}).get("architecture")
        base = f"converted from `{source}`" if source else "trained from scratch" if from_scratch else NOT_RECORDED
    code = f"longclip {lineage.code_version}" if lineage.code_version else NOT_RECORDED
    return {
        "training run": run,
        "data": ", ".join(data) or NOT_RECORDED,
        "base": base,
        "code": code + (f", commit `{lineage.git_commit}`" if lineage.git_commit else ""),
    }


def with_section(card: str, title: str, body: str) -> str:
    """A card with a section in place of the one with the same title, or as a new one before the limits."""
    head, *sections = re.split(r"(?m)^(?=## )", card)
    new = f"## {title}\n\n{body.strip()}\n\n"
    titles = [section.partition("\n")[0].removeprefix("## ") for section in sections]
    if title in titles:
        sections[titles.index(title)] = new
    else:
        sections.insert(titles.index(LIMITS) if LIMITS in titles else len(sections), new)
    return "".join([head.rstrip() + "\n\n", *sections]).rstrip() + "\n"


def without_section(card: str, title: str) -> str:
    """A card without the section of a title."""
    sections = re.split(r"(?m)^(?=## )", card)
    return "".join(part for part in sections if part.partition("\n")[0] != f"## {title}").rstrip() + "\n"


def description(card: str) -> str:
    """What a version's description holds of a card: no recipe, which is in the parameters of its run, and at most
    `MAX_DESCRIPTION` characters."""
    text = without_section(card, RECIPE)
    if len(text) <= MAX_DESCRIPTION:
        return text
    rest = "\n\nThis is the beginning; the whole card is `artifacts/README.md` in the files of this version.\n"
    return text[: MAX_DESCRIPTION - len(rest)].rpartition("\n")[0] + rest
