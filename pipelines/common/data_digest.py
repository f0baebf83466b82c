"""Which data a job read: a digest that a checkpoint and its training run record."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.common.events import warn
from pipelines.common.file_listing import file_versions
from pipelines.common.parquet_set import MANIFEST, ParquetSet, manifest_of
from pipelines.common.storage import explained


@dataclass(frozen=True)
class DataDigest:
    """Identity of a set of Parquet files."""

    name: str
    """Name of the directory or file; of a split, also that of the directory above it."""
    digest: str
    """First 16 hex digits of a sha256."""
    of: Literal["manifest", "files"]
    """What it was computed from: the bytes of `_manifest.json`; or names, sizes and rows of the files, and their
    columns, which does not see a change that keeps all of these."""
    manifest: dict[str, Any]
    """The manifest; empty if the digest is not that of one."""


def data_digest(field: str, data: ParquetSet) -> DataDigest:
    """Digest of a set: of its manifest if that lists exactly these files, otherwise of the files themselves.

    Args:
        field: setting that names the set, for messages.
        data: the opened set; the manifest of a split is in the directory above it.

    Raises:
        DataError: the storage cannot be read.
    """
    root, base = data.root, data.root.path.rstrip("/")
    with explained(field, root):
        sizes = {path[len(base) :]: info.get("size") for path, info in file_versions(root)}
        names = [(file.path.path[len(base) :], file.rows) for file in data.files]
        files = sorted([name, sizes.get(name), rows] for name, rows in names)
        for folder, name in ((root, root.name), (root.parent, f"{root.parent.name}/{root.name}")):
            manifest = manifest_of(folder)
            if manifest and (folder == root or root.name in manifest.get("splits", {})):
                if _listed(manifest, "" if folder == root else root.name) == files:
                    return DataDigest(name, _short((folder / MANIFEST).read_bytes()), "manifest", manifest)
                warn(
                    f"{field}='{root}': {MANIFEST} does not list the files that are there, which are identified by"
                    " their names, sizes, rows and columns instead; the job that wrote them can write them again"
                )
    described = {"files": files, "columns": {column.name: str(column.type) for column in data.schema}}
    return DataDigest(root.name, _short(json.dumps(described, sort_keys=True).encode()), "files", {})


def _listed(manifest: dict[str, Any], split: str) -> list[list[Any]]:
    """[path below the split, bytes, rows] of the files with rows that a manifest lists."""
    listed = [[f"/{file['name']}", file["bytes"], file["rows"]] for file in manifest.get("files", []) if file["rows"]]
    below = f"/{split}" if split else ""
    return sorted([name.removeprefix(below), *rest] for name, *rest in listed if name.startswith(f"{below}/"))


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
