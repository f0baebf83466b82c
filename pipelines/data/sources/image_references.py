"""Images that a row refers to: paths below a root directory, and URIs."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import fsspec
from upath import UPath

from pipelines.common.storage import Storage

MISSING_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class ImageReferences:
    """Fetches images by path or URI, many at a time."""

    def __init__(self, root: UPath, uri_schemes: Sequence[str], max_bytes: int, storage: Storage) -> None:
        """
        Args:
            root: base of relative paths; paths outside it are rejected.
            uri_schemes: allowed schemes of URIs.
            max_bytes: maximum size of a file; larger ones are not read.
            storage: access to object storage.
        """
        self.root, self.schemes, self.max_bytes, self.storage = root, tuple(uri_schemes), max_bytes, storage

    def fetch(self, references: Sequence[str]) -> list[bytes | str]:
        """Each image, or the reason why it cannot be read.

        Raises:
            OSError: storage failed after all retries; the images may exist.
        """
        results: list[bytes | str] = [""] * len(references)
        by_scheme: dict[str, list[tuple[int, str]]] = {}
        for index, reference in enumerate(references):
            problem = self._problem(reference)
            if problem:
                results[index] = problem
            elif "://" in reference:
                by_scheme.setdefault(urlsplit(reference).scheme, []).append((index, reference))
            else:
                # A plain string, not UPath: names with ':' or '%' must not be parsed as URIs.
                by_scheme.setdefault("", []).append((index, f"{self.root.path.rstrip('/')}/{PurePosixPath(reference)}"))
        for scheme, requests in by_scheme.items():
            fs = fsspec.filesystem(scheme, **self.storage.options(scheme)) if scheme else self.root.fs
            paths = [fs._strip_protocol(path) for _, path in requests]
            files = fs.cat_ranges(paths, 0, self.max_bytes + 1, on_error="return")
            for (index, _), content in zip(requests, files, strict=True):
                results[index] = self._checked(content, references[index])
        return results

    def _problem(self, reference: str) -> str | None:
        if "://" in reference:
            scheme = urlsplit(reference).scheme
            if scheme in self.schemes:
                return None
            hint = "; download it first, e.g. with img2dataset" if scheme in ("http", "https") else ""
            return f"image '{reference}': scheme '{scheme}' is not in source.uri_schemes{hint}"
        path = PurePosixPath(reference)
        if not reference or path.is_absolute() or ".." in path.parts or "\0" in reference:
            return f"image '{reference}' is not a path below source.images"
        return None

    def _checked(self, content: bytes | Exception, reference: str) -> bytes | str:
        if isinstance(content, MISSING_FILE_ERRORS):
            return f"image '{reference}' does not exist" + (
                " or is not readable" * isinstance(content, PermissionError)
            )
        if isinstance(content, Exception):
            raise content
        if len(content) > self.max_bytes:
            return f"image '{reference}' has more than source.max_image_bytes={self.max_bytes} bytes"
        return content
