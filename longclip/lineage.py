"""Where a checkpoint comes from, as its manifest records it: the training run, its data, base model and code."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longclip.files import MANIFEST

KEY = "lineage"
"""Key of the manifest's metadata."""


@dataclass(frozen=True)
class Lineage:
    """None: not recorded, as in checkpoints of older versions and of other software."""

    run_id: str | None = None
    """MLflow run that trained the checkpoint."""
    data_digest: str | None = None
    """First 16 hex digits of a sha256 that identifies the training data."""
    data_digest_of: str | None = None
    """What that sha256 was computed from: `manifest` (the file `_manifest.json` of the data set) or `files` (names,
    sizes and rows of its files, and its schema)."""
    base: str | None = None
    """Name of the model that training started from."""
    base_checkpoint_id: str | None = None
    base_run_id: str | None = None
    """MLflow run that trained the base."""
    code_version: str | None = None
    """Version of this package."""
    git_commit: str | None = None
    """Commit of the code, followed by `-changed` if files differed from it."""

    def metadata(self) -> dict[str, Any]:
        """The part of a manifest's metadata that `read_lineage` reads."""
        return {KEY: asdict(self)}


def read_lineage(directory: Path) -> Lineage:
    """Lineage of a checkpoint directory; what its manifest does not record, or not as text, is None."""
    recorded = read_metadata(directory).get(KEY)
    if not isinstance(recorded, dict):
        return Lineage()
    names = [field.name for field in fields(Lineage)]
    return Lineage(**{name: recorded[name] for name in names if isinstance(recorded.get(name), str)})


def read_metadata(directory: Path) -> dict[str, Any]:
    """Metadata of a checkpoint's manifest; empty for a directory without a readable manifest."""
    try:
        metadata = json.loads((directory / MANIFEST).read_bytes())["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def model_name(directory: Path) -> str:
    """A name for the model in a directory: that of the file it was converted from, or of the run that trained it."""
    metadata = read_metadata(directory)
    settings = metadata.get("settings")
    for recorded in (metadata.get("source"), settings.get("output") if isinstance(settings, dict) else None):
        if isinstance(recorded, str) and recorded:
            return Path(recorded).name if Path(recorded).is_absolute() else recorded
    directory = directory.absolute()
    return directory.parent.name if directory.name == "checkpoint" else directory.name
