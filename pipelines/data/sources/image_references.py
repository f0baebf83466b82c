"""Images that stand elsewhere: paths below a root, and URIs."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import fsspec
from upath import UPath

from pipelines.common.storage import Storage

NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class ImageReferences:
    """Fetches images by reference, many at a time."""

    def __init__(self, root: UPath, uri_schemes: Sequence[str], max_bytes: int, storage: Storage) -> None:
        """
        Args:
            root: what relative paths are relative to; none may leave it.
            uri_schemes: schemes of URIs that may be followed.
            max_bytes: largest file; more is not read.
            storage: how object storage is reached.
        """
        self.root, self.schemes, self.max_bytes, self.storage = root, tuple(uri_schemes), max_bytes, storage

    def fetch(self, references: Sequence[str]) -> list[bytes | str]:
        """Each image, or why it cannot be had.

        Raises:
            OSError: storage failed after all retries; the images may be there.
        """
        results: list[bytes | str] = [""] * len(references)
        wanted: dict[str, list[tuple[int, str]]] = {}
        for place, reference in enumerate(references):
            problem = self._problem(reference)
            if problem:
                results[place] = problem
            elif "://" in reference:
                wanted.setdefault(urlsplit(reference).scheme, []).append((place, reference))
            else:
                # A plain string, not UPath: names with ':' or '%' must not be taken for URIs.
                wanted.setdefault("", []).append((place, f"{self.root.path.rstrip('/')}/{PurePosixPath(reference)}"))
        for scheme, members in wanted.items():
            fs = fsspec.filesystem(scheme, **self.storage.options(scheme)) if scheme else self.root.fs
            paths = [fs._strip_protocol(path) for _, path in members]
            files = fs.cat_ranges(paths, 0, self.max_bytes + 1, on_error="return")
            for (place, _), content in zip(members, files, strict=True):
                results[place] = self._checked(content, references[place])
        return results

    def _problem(self, reference: str) -> str | None:
        if "://" in reference:
            scheme = urlsplit(reference).scheme
            if scheme in self.schemes:
                return None
            hint = "; download it first, e.g. with img2dataset" if scheme in ("http", "https") else ""
            return f"image '{reference}': scheme '{scheme}' is not among source.uri_schemes{hint}"
        path = PurePosixPath(reference)
        if not reference or path.is_absolute() or ".." in path.parts or "\0" in reference:
            return f"image '{reference}' is no path below source.images"
        return None

    def _checked(self, content: bytes | Exception, reference: str) -> bytes | str:
        if isinstance(content, NOT_THERE):
            return f"image '{reference}' does not exist" + (
                " or may not be read" * isinstance(content, PermissionError)
            )
        if isinstance(content, Exception):
            raise content
        if len(content) > self.max_bytes:
            return f"image '{reference}' has more than source.max_image_bytes={self.max_bytes} bytes"
        return content
