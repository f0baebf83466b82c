"""Cleaning of source rows: texts are checked, images decoded once, hashed and, if wanted, reduced."""

import contextlib
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image
from upath import UPath

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError, ImageError
from longclip.images import decode_image
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.parquet_set import RowGroups, parquet_writer
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.whole_files import whole_file
from pipelines.data.settings import CleanSettings
from pipelines.data.sources.source import Piece, Source, SourceRow

SPLITS = ("train", "val")
KEY = "_key"
"""Column of the staged rows that duplicates share."""

BATCH_ROWS = 32
JPEG_QUALITY = 95


class ImageHashes:
    """Hashes of the images in evaluation sets."""

    def __init__(self, sha256: set[str], perceptual: np.ndarray) -> None:
        """
        Args:
            sha256: hex digests of image files.
            perceptual: `[M]` uint64 perceptual hashes.
        """
        self.sha256, self.perceptual = sha256, perceptual

    def nearest(self, sha256: str, perceptual: int) -> int | None:
        """Number of bits that differ between an image and the most similar one; 0 for the same file, None if empty."""
        if sha256 in self.sha256:
            return 0
        if not len(self.perceptual):
            return None
        return int(np.bitwise_count(self.perceptual ^ np.uint64(perceptual)).min())


class CleanPiece:
    """Cleans a piece of a source: writes one staged Parquet per split, and one of rejected rows."""

    def __init__(self, source: Source, settings: CleanSettings, folder: UPath, overlap: ImageHashes | None) -> None:
        self.source, self.settings, self.folder, self.overlap = source, settings, folder, overlap
        self.schema = staged_schema(source)

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Clean a piece; see `pipelines.data.work_units.UnitTask`. The result also has `overlapping` rows, the rows and
        staged bytes of each split, caption `tokens` and grouped `reasons`."""
        piece = Piece(**unit)
        rejected = Rejected(piece.file)
        tokens: Counter[int] = Counter()
        rows_in = 0
        outputs: dict[str, RowGroups] = {}
        with contextlib.ExitStack() as files:
            for split in SPLITS:
                local = files.enter_context(whole_file(staged_path(self.folder, number, split)))
                outputs[split] = files.enter_context(parquet_writer(local, self.schema))
            for batch in _batches(self.source.read(piece)):
                rows_in += len(batch)
                clean = self._clean(batch, rejected)
                for split in SPLITS:
                    part = [row for row in clean if split_of(row["sha256"], self.settings.val_fraction) == split]
                    if part:
                        outputs[split].add(pa.RecordBatch.from_pylist(part, self.schema))
                tokens.update(row["caption_tokens"] for row in clean)
        write_rejected(rejected, self.folder, number)
        counts = {split: outputs[split].rows for split in SPLITS}
        return {
            "rows_in": rows_in,
            "rows_out": sum(counts.values()),
            "rejected": rejected.count("read", "caption", "image"),
            "overlapping": rejected.count("overlap"),
            "first_rejected": rejected.first,
            "reasons": rejected.grouped,
            "splits": counts,
            "bytes": {split: outputs[split].bytes for split in SPLITS},
            "tokens": dict(tokens),
        }

    def _clean(self, batch: list[SourceRow], rejected: Rejected) -> list[dict[str, Any]]:
        clean = []
        for row in batch:
            stage = "read"
            try:
                if row.problem:
                    raise DataError(row.problem)
                stage = "caption"
                captions = clean_captions(row, self.settings.max_caption_characters)
                stage = "image"
                columns = self._image_columns(row.image)
                stage = "overlap"
                self._check_overlap(columns)
            except DataError as error:
                rejected.add(row.id, stage, str(error))
                continue
            columns["caption"] = captions if self.source.lists else captions[0]
            columns["caption_tokens"] = max(count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), captions))
            columns[KEY] = _duplicate_key(self.settings.deduplicate, columns["sha256"], captions)
            clean.append({**row.extra, "id": row.id, **columns})
        return clean

    def _image_columns(self, data: bytes) -> dict[str, Any]:
        settings = self.settings.image
        if not data:
            raise ImageError("image is empty")
        image = decode_image(data, settings.max_pixels)
        if min(image.size) < settings.min_side:
            raise ImageError(
                f"image has {image.width} x {image.height} pixels; sides of at least {settings.min_side} are required"
            )
        perceptual = int(str(imagehash.phash(image)), 16)
        sha256 = hashlib.sha256(data).hexdigest()
        if settings.short_side is not None and min(image.size) > settings.short_side:
            image, data = _reduced(image, settings.short_side)
        return {
            "image": data,
            "width": image.width,
            "height": image.height,
            "sha256": sha256,
            "phash": f"{perceptual:016x}",
        }

    def _check_overlap(self, columns: dict[str, Any]) -> None:
        if self.overlap is None:
            return
        bits = self.overlap.nearest(columns["sha256"], int(columns["phash"], 16))
        if bits is not None and bits <= self.settings.overlap_distance:
            raise DataError(f"image is in an evaluation set (perceptual hashes differ in {bits} of 64 bits)")


class HashPiece:
    """Hashes the images of a piece of an evaluation set; images that cannot be decoded are skipped."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Hash a piece; see `pipelines.data.work_units.UnitTask`. The result has the hashes."""
        sha256, perceptual, rows_in = [], [], 0
        for row in self.source.read(Piece(**unit)):
            rows_in += 1
            with contextlib.suppress(ImageError):
                perceptual.append(str(imagehash.phash(decode_image(row.image, self.max_pixels))))
                sha256.append(hashlib.sha256(row.image).hexdigest())
        rejected = rows_in - len(sha256)
        return {
            "rows_in": rows_in,
            "rows_out": len(sha256),
            "rejected": rejected,
            "sha256": sha256,
            "phash": perceptual,
        }


def staged_schema(source: Source) -> pa.Schema:
    """Schema of staged rows; the output has all columns but `KEY`."""
    caption = pa.list_(pa.string()) if source.lists else pa.string()
    fields = [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("caption", caption),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("caption_tokens", pa.int32()),
        (KEY, pa.binary(16)),
    ]
    return pa.schema([*fields, *source.extra])


def staged_path(folder: UPath, number: int, split: str) -> UPath:
    """File with the staged rows of a unit and split."""
    return folder / f"{number:06d}.{split}.parquet"


def split_of(sha256: str, val_fraction: float) -> str:
    """Split of an image, by the first 32 bits of its hash."""
    return "val" if int(sha256[:8], 16) < val_fraction * 2**32 else "train"


def clean_captions(row: SourceRow, max_characters: int) -> list[str]:
    """Captions with normalized white space; empty ones are dropped.

    Raises:
        DataError: all are empty, or one is too long or not valid Unicode.
    """
    captions = []
    for text in row.captions:
        caption = " ".join(text.replace("\0", " ").split())
        if len(caption) > max_characters:
            raise DataError(f"caption has {len(caption)} characters; at most {max_characters} are allowed")
        if not _is_unicode(caption):
            raise DataError("caption is not valid Unicode: it contains half of a surrogate pair")
        if caption:
            captions.append(caption)
    if not captions:
        raise DataError("caption is empty")
    return captions


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reduced(image: Image.Image, short_side: int) -> tuple[Image.Image, bytes]:
    scale = short_side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return image, out.getvalue()


def _duplicate_key(kind: str, sha256: str, captions: list[str]) -> bytes | None:
    if kind == "none":
        return None
    text = "\0".join(captions) if kind == "row" else ""
    return hashlib.sha256(f"{sha256}\0{text}".encode()).digest()[:16]


def _batches(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch
