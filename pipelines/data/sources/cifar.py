"""CIFAR-10 and CIFAR-100 in their binary versions: raw pixels, nothing to unpickle."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from PIL import Image
from upath import UPath

from longclip.errors import DataError
from pipelines.data.sources.source import Piece, SourceRow

SIDE = 32
PIXELS = 3 * SIDE * SIDE
FILES = {"test_batch.bin": 1, "test.bin": 2}
"""Test files of CIFAR-10 and CIFAR-100, and the number of label bytes before the pixels; the last is the class."""

ARCHIVES = {
    "cifar-10-binary.tar.gz": ("cifar-10-batches-bin/test_batch.bin", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar-100-binary.tar.gz": ("cifar-100-binary/test.bin", "03b5dce01913d631647c71ecec9e9cb8"),
}
"""Test file in each archive, and the MD5 of the archive according to https://www.cs.toronto.edu/~kriz/cifar.html."""


class CifarSource:
    """The test images; the caption is the number of the class."""

    lists = False
    extra = pa.schema([])

    def __init__(self, field: str, path: UPath) -> None:
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).is_file()), path)
        if path.name not in (*FILES, *ARCHIVES):
            raise DataError(
                f"{field}='{path}' is not one of {', '.join((*ARCHIVES, *FILES))}, nor a directory with one of the last"
                " two; give the binary version of CIFAR"
            )
        self.file, self.member = path, ARCHIVES[path.name][0] if path.name in ARCHIVES else None
        if self.member:
            with path.open("rb") as file:
                actual, expected = hashlib.md5(file.read()).hexdigest(), ARCHIVES[path.name][1]
            if actual != expected:
                raise DataError(f"{field}='{path}' has MD5 {actual} instead of {expected}; download it again")
        self.name = (self.member or path.name).rpartition("/")[2]
        self.record = FILES[self.name] + PIXELS
        with self._open() as file:
            size = file.seek(0, io.SEEK_END)
        if not size or size % self.record:
            raise DataError(f"{field}='{path}' has {size} bytes, not a multiple of {self.record}; download it again")
        self.rows = size // self.record

    def describe(self) -> str:
        """See `Source`."""
        return f"cifar: {self.file}, {self.rows} images"

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`."""
        return [Piece(str(self.file), rows=self.rows)]

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`; images are encoded as PNG, which is lossless."""
        with self._open() as file:
            for number in range(self.rows):
                record = np.frombuffer(file.read(self.record), np.uint8)
                out = io.BytesIO()
                Image.fromarray(record[-PIXELS:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)).save(out, "PNG")
                label = record[-PIXELS - 1]
                yield SourceRow(f"{self.name.removesuffix('.bin')}-{number:05d}", out.getvalue(), [str(label)])

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with self.file.open("rb") as file:
            if self.member is None:
                yield file
                return
            with tarfile.open(fileobj=file, mode="r:gz") as tar:
                yield tar.extractfile(self.member)  # type: ignore[misc]
