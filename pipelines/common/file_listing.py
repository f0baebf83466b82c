"""Files below a path: symbolic links are followed, hidden files are left out, and what is left out is counted."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upath import UPath

from longclip.errors import DataError
from pipelines.common.storage import is_local

HIDDEN = (".", "_")
"""First characters of the names that readers of Parquet and tars pass over, such as `.cache` and `_SUCCESS`."""

HIDDEN_MEDIA = (".", "__MACOSX")
"""The same among images and texts: cameras write names such as `_DSC0001.jpg`."""

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
MAX_KINDS = 5


@dataclass(frozen=True)
class FileListing:
    """Files below a directory, or a single file."""

    root: UPath
    names: tuple[str, ...]
    """Paths relative to the root, sorted."""
    ignored: Counter[str]
    """Numbers of the entries that are not in `names`, by what they are."""

    def having(self, suffixes: tuple[str, ...]) -> list[str]:
        """The names with one of these suffixes, in any case."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def others(self, suffixes: tuple[str, ...]) -> str:
        """What there is in addition to the files with these suffixes, for the log; empty if there is nothing."""
        kinds = Counter(self.ignored)
        kinds.update(
            os.path.splitext(name)[1].lower() or "without a suffix"
            for name in self.names
            if not name.lower().endswith(suffixes)
        )
        parts = [f"{count} {kind}" for kind, count in kinds.most_common(MAX_KINDS)]
        rest = kinds.total() - sum(count for _, count in kinds.most_common(MAX_KINDS))
        parts += [f"{rest} of other kinds"] if rest else []
        return f"; other files: {', '.join(parts)}" if parts else ""

    def data_files(self, field: str, suffixes: tuple[str, ...]) -> list[UPath]:
        """The files with these suffixes, which must all be readable.

        Args:
            field: setting that names the root, for messages.
            suffixes: allowed suffixes, in lower case.

        Raises:
            DataError: there are none, or one is a link that leads nowhere or has a name that is not UTF-8.
        """
        if self.root.is_file():
            return [self.root]
        names = self.having(suffixes)
        if not names:
            raise DataError(
                f"{field}='{self.root}' contains no {suffixes[0]} file{self.others(suffixes)}; give a directory that"
                " does"
            )
        for name in names:
            if not name.isascii() and name != name.encode(errors="replace").decode():
                shown = name.encode(errors="backslashreplace").decode()
                raise DataError(f"{field}='{self.root}': the name of '{shown}' is not UTF-8; rename the file")
            path = self.root / name
            if is_local(path) and not os.path.exists(path.path):
                raise DataError(
                    f"{field}='{self.root}': '{name}' is a symbolic link to '{os.readlink(path.path)}', which does not"
                    " exist; restore that file, or remove the link"
                )
        return [self.root / name for name in names]


def list_files(root: UPath, hidden: tuple[str, ...] = HIDDEN) -> FileListing:
    """List the files below a directory. Links to directories are followed; links to missing files are listed.

    Args:
        root: existing directory or file.
        hidden: beginnings of the names of files and directories to leave out.

    Raises:
        OSError: a directory cannot be read.
    """
    if not root.is_dir():
        return FileListing(root, (root.name,), Counter())
    base = root.path.rstrip("/")
    ignored: Counter[str] = Counter()
    paths = _walk(base, hidden, ignored) if is_local(root) else root.fs.find(base)
    names = []
    for path in paths:
        name = path[len(base) + 1 :]
        if any(part.startswith(hidden) for part in name.split("/")):
            ignored["hidden"] += 1
        else:
            names.append(name)
    return FileListing(root, tuple(sorted(names)), ignored)


def file_versions(root: UPath) -> list[tuple[str, dict[str, Any]]]:
    """Paths of all files at or below a path, sorted, with what tells their versions apart, as fsspec's `find` gives it;
    of links, that of the files that they lead to."""
    if not (is_local(root) and root.is_dir()):
        return sorted(root.fs.find(root.path, detail=True).items())
    versions = []
    for path in sorted(_walk(root.path.rstrip("/"), (), Counter())):
        try:
            info = os.stat(path)
        except OSError:  # a link that leads nowhere
            info = os.lstat(path)
        versions.append((path, {"size": info.st_size, "mtime": info.st_mtime}))
    return versions


def _walk(base: str, hidden: tuple[str, ...], ignored: Counter[str]) -> Iterator[str]:
    """Files below a local directory; what fsspec's `find` gives, but with links followed."""
    for folder, folders, names in os.walk(base, followlinks=True, onerror=_raise):
        for name in list(folders):
            if name.startswith(hidden):
                folders.remove(name)
                ignored["hidden"] += 1
            elif os.path.islink(f"{folder}/{name}") and _leads_back(base, f"{folder}/{name}"):
                folders.remove(name)
                ignored["links to a directory above"] += 1
        for name in names:
            if _is_special(f"{folder}/{name}"):
                ignored["devices, pipes and sockets"] += 1
            else:
                yield f"{folder}/{name}"


def _raise(error: OSError) -> None:
    raise error


def _leads_back(base: str, link: str) -> bool:
    """Whether a link leads to a directory that was passed through on the way to it."""
    passed, folder = set(), os.path.dirname(link)
    while len(folder) >= len(base):
        passed.add(os.path.realpath(folder))
        folder = os.path.dirname(folder)
    return os.path.realpath(link) in passed


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:  # a link that leads nowhere
        return False
    return not stat.S_ISREG(mode)
