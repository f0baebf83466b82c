"""The workspace of an unfinished output: the directory `.<name>.partial` next to it.

A lease gives it to one job at a time. The next run with the same settings and data resumes a job that was killed; the
output is published under its name when it is complete.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upath import UPath

from longclip.errors import ConfigError
from longclip.files import publish_directory
from pipelines.common.file_listing import file_versions
from pipelines.common.lease import Lease
from pipelines.common.parquet_set import INCOMPLETE, MANIFEST, manifest_of
from pipelines.common.settings import flattened
from pipelines.common.storage import Storage, existing_path, explained, is_local
from pipelines.common.whole_files import make_directory, remove, write_whole

IDENTITY, LEASE, TREE = "identity.json", "lease.json", "output"


@dataclass
class Workspace:
    """The unfinished output of a job."""

    output: UPath
    """Final path."""
    identity: Mapping[str, Any]
    """Everything the output depends on: two runs with the same identity make the same output."""
    lease: Lease
    manifest: dict[str, Any] = field(default_factory=dict)
    """Manifest of the output if it is already finished; otherwise empty."""

    @property
    def partial(self) -> UPath:
        """Directory of the workspace."""
        return partial_path(self.output)

    def folder(self, name: str) -> UPath:
        """A directory in the workspace, created if necessary."""
        folder = self.partial / name
        make_directory(folder)
        return folder

    @property
    def tree(self) -> UPath:
        """Directory of the files that will be published."""
        return self.folder(TREE)

    def planned(self, stage: str, plan: Callable[[UPath], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The units of a stage as JSON values: made by `plan`, which gets a directory for its own files, in the first
        run, and stored for all later runs."""
        path = self.partial / f"{stage}.plan.json"
        if not path.exists():
            write_whole(path, json.dumps(plan(self.folder(f"{stage}.plan"))).encode())
        return json.loads(path.read_bytes())

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Replace the output by `tree` and a manifest, then remove the workspace.

        On a local disk this is one rename. Object storage cannot rename: there, the output contains a marker file
        (`_INCOMPLETE`), which readers check, while files are copied; the manifest is copied last.
        """
        text = json.dumps({**manifest, "identity": self.identity}, indent=2).encode() + b"\n"
        write_whole(self.tree / MANIFEST, text)
        self.lease.check()
        if is_local(self.output):
            for temporary in list(Path(self.tree.path).rglob(".*")):  # of workers killed while writing
                remove(UPath(temporary))
            publish_directory(Path(self.tree.path), Path(self.output.path))
        else:
            _publish_objects(self.tree, self.output)
        self.lease.release()
        remove(self.partial)


def partial_path(output: UPath) -> UPath:
    """Workspace of an output."""
    return output.parent / f".{output.name}.partial"


@contextmanager
def claim(output: UPath, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Workspace]:
    """Hold the workspace of an output while the block runs. Its content is kept if the block fails.

    Args:
        output: final path of the output.
        identity: everything the output depends on: `job`, `settings`, `source`.
        overwrite: replace an output, or unfinished work, with another identity.

    Raises:
        ConfigError: another job holds it, or it has another identity and `overwrite` is false.
    """
    identity = json.loads(json.dumps(identity))
    partial = partial_path(output)
    make_directory(partial)
    with Lease(partial / LEASE, str(output)) as lease:
        workspace = Workspace(output, identity, lease)
        manifest = manifest_of(output)
        if manifest.get("identity") == identity:
            workspace.manifest = manifest
            yield workspace
            lease.release()
            remove(partial)
            return
        _refuse_other_output(output, manifest, identity, overwrite)
        _continue_or_start(partial, output, identity, overwrite)
        yield workspace


def fingerprint(field: str, value: str, storage: Storage) -> str:
    """Digest of the names, sizes and ETags or modification times of all files at or below a path."""
    path = existing_path(field, value, storage)
    digest = hashlib.sha256()
    with explained(field, value):
        for name, info in file_versions(path):
            version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
            digest.update(f"{name}\0{info.get('size')}\0{version}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _refuse_other_output(output: UPath, manifest: Mapping[str, Any], identity: Mapping, overwrite: bool) -> None:
    if manifest and not overwrite:
        raise ConfigError(
            f"output='{output}' is finished, but was made with {_difference(manifest.get('identity', {}), identity)};"
            " choose another output, or replace it with --set overwrite=true"
        )
    if manifest or (output / INCOMPLETE).exists() or not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ConfigError(
            f"output='{output}' exists and was not made by this job (it has no {MANIFEST}); choose another output, or"
            " remove it yourself"
        )


def _continue_or_start(partial: UPath, output: UPath, identity: Mapping[str, Any], overwrite: bool) -> None:
    path = partial / IDENTITY
    if path.exists():
        unfinished = json.loads(path.read_bytes())
        if unfinished == identity:
            return
        if not overwrite:
            raise ConfigError(
                f"output='{output}' has unfinished work with {_difference(unfinished, identity)}; run with those"
                " settings to finish it, choose another output, or discard that work with --set overwrite=true"
            )
    for entry in list(partial.iterdir()):
        if entry.name != LEASE:
            remove(entry)
    write_whole(path, json.dumps(identity).encode())


def _difference(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """What distinguishes an existing identity from the requested one, for messages."""
    if existing.get("job") != requested.get("job"):
        return f"job '{existing.get('job')}'"
    before, after = flattened(existing.get("settings", {})), flattened(requested.get("settings", {}))
    changed = [f"{key}={before.get(key)!r}" for key in sorted(before | after) if before.get(key) != after.get(key)]
    if changed:
        return f"other settings ({', '.join(changed)})"
    return "other data: the files of the input have changed"


def _publish_objects(tree: UPath, output: UPath) -> None:
    fs, source, target = output.fs, tree.path.rstrip("/"), output.path.rstrip("/")
    write_whole(output / INCOMPLETE, b"")
    names = [name[len(source) + 1 :] for name in fs.find(source)]
    stale = set(fs.find(target)) - {f"{target}/{name}" for name in names} - {f"{target}/{INCOMPLETE}"}
    for name in sorted(stale):
        fs.rm_file(name)
    for name in sorted(names, key=lambda name: name == MANIFEST):
        fs.cp_file(f"{source}/{name}", f"{target}/{name}")
    (output / INCOMPLETE).unlink()
