"""Images that a row refers to: paths below a root directory, and URIs."""

import errno
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import fsspec
from botocore.exceptions import ParamValidationError
from upath import UPath

from longclip.errors import one_line
from pipelines.common.storage import Storage
from pipelines.data.sources.text_decoding import is_unicode, printable

MISSING_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
UNUSABLE_NAME_ERRORS = (ValueError, ParamValidationError)
UNUSABLE_NAME_CODES = {errno.ENAMETOOLONG: "has a name that is too long", errno.ELOOP: "is a symbolic link in a circle"}
MAX_BYTES, MAX_KEY_BYTES = 4096, 1024
"""Longest path of Linux, and longest key of object storage."""

MAX_SHOWN = 80
_BASE64 = re.compile(r"data:\w+/[\w.+-]+;base64,.*|[A-Za-z0-9+/_\s-]{256,}=*\s*", re.DOTALL)


def unusable_reference(reference: str) -> str | None:
    """Why a text cannot name an image anywhere; None if it can."""
    shown = printable(reference, MAX_SHOWN)
    if not reference:
        return "image is missing"
    if _BASE64.fullmatch(reference):
        return f"image '{shown}' is base64 text, not a path; decode it to bytes first"
    if "\0" in reference:
        return f"image '{printable(reference.replace(chr(0), '␀'), MAX_SHOWN)}' has a NUL character in its path"
    if not is_unicode(reference):
        return f"image '{shown}' has a name that is not valid Unicode; rename the file"
    if len(reference.encode()) > (MAX_KEY_BYTES if "://" in reference else MAX_BYTES):
        return f"image '{shown}' is too long for a path"
    return None


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
            problem = unusable_reference(reference) or self._problem(reference)
            if problem:
                results[index] = problem
            elif "://" in reference:
                by_scheme.setdefault(_scheme(reference), []).append((index, reference))
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
        shown = printable(reference, MAX_SHOWN)
        if "://" in reference:
            scheme = _scheme(reference)
            if scheme in self.schemes:
                return None
            hint = "; download it first, e.g. with img2dataset" if scheme in ("http", "https") else ""
            return f"image '{shown}': scheme '{printable(scheme, 20)}' is not in source.uri_schemes{hint}"
        path = PurePosixPath(reference)
        if path.is_absolute() or ".." in path.parts:
            return f"image '{shown}' is not a path below source.images"
        return None

    def _checked(self, content: bytes | Exception, reference: str) -> bytes | str:
        shown = printable(reference, MAX_SHOWN)
        if isinstance(content, MISSING_FILE_ERRORS):
            return f"image '{shown}' does not exist" + (" or is not readable" * isinstance(content, PermissionError))
        if isinstance(content, OSError) and content.errno in UNUSABLE_NAME_CODES:
            return f"image '{shown}' {UNUSABLE_NAME_CODES[content.errno]}"
        if isinstance(content, UNUSABLE_NAME_ERRORS):
            return f"image '{shown}' has an unusable name: {one_line(content, 100)}"
        if isinstance(content, Exception):
            raise content
        if len(content) > self.max_bytes:
            return f"image '{shown}' has more than source.max_image_bytes={self.max_bytes} bytes"
        return content


def _scheme(uri: str) -> str:
    return uri.partition("://")[0].lower()
