"""Cleaning of source rows: texts are checked, images decoded once, hashed and, if wanted, reduced."""

import contextlib
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import imagehash
import pyarrow as pa
from PIL import Image
from upath import UPath

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.parquet_set import RowGroups, parquet_writer
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.whole_files import whole_file
from pipelines.data.decontamination import ImageHashes
from pipelines.data.settings import KEY, CleanSettings
from pipelines.data.sources.source import Piece, Source, SourceRow, read_piece
from pipelines.data.sources.text_decoding import is_unicode
from pipelines.data.usable_images import usable_image

SPLITS = ("train", "val")
BATCH_ROWS = 32
JPEG_QUALITY = 95


class CleanPiece:
    """Cleans a piece of a source: writes one staged Parquet per split, and one of rejected rows."""

    def __init__(
        self, source: Source, settings: CleanSettings, folder: UPath, overlap: Mapping[str, ImageHashes]
    ) -> None:
        """
        Args:
            source: where the rows are read from.
            settings: what makes a row clean.
            folder: directory for the staged and the rejected rows.
            overlap: hashes of each evaluation set, by its name.
        """
        self.source, self.settings, self.folder, self.overlap = source, settings, folder, overlap
        self.schema = staged_schema(source)

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Clean a piece; see `pipelines.data.work_units.UnitTask`. The result also has the rows and
        staged bytes of each split, caption `tokens` and grouped `reasons`. `overlapping` counts by evaluation set."""
        piece = Piece(**unit)
        rejected = Rejected(piece.origin)
        tokens: Counter[int] = Counter()
        overlapping: Counter[str] = Counter()
        rows_in = 0
        outputs: dict[str, RowGroups] = {}
        with contextlib.ExitStack() as files:
            for split in SPLITS:
                local = files.enter_context(whole_file(staged_path(self.folder, number, split)))
                outputs[split] = files.enter_context(parquet_writer(local, self.schema))
            for batch in _batches(read_piece(self.source, "input", piece)):
                rows_in += len(batch)
                clean = self._clean(batch, rejected, overlapping)
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
            "overlapping": dict(overlapping),
            "first_rejected": rejected.first,
            "reasons": rejected.grouped,
            "splits": counts,
            "bytes": {split: outputs[split].bytes for split in SPLITS},
            "tokens": dict(tokens),
        }

    def _clean(self, batch: list[SourceRow], rejected: Rejected, overlapping: Counter[str]) -> list[dict[str, Any]]:
        clean = []
        for row in batch:
            stage = "read"
            try:
                if row.problem:
                    raise DataError(row.problem)
                if not is_unicode(row.id):
                    raise DataError("id is not valid Unicode: it contains half of a surrogate pair")
                stage = "caption"
                captions = clean_captions(row, self.settings.max_caption_characters)
                stage = "image"
                columns = self._image_columns(row.image)
            except DataError as error:
                rejected.add(row.id, stage, str(error), " ".join(row.captions), row.image)
                continue
            name, bits = self._overlap(columns)
            if name is not None:
                overlapping[name] += 1
                reason = f"image is in evaluation set '{name}' (perceptual hashes differ in {bits} of 64 bits)"
                rejected.add(row.id, "overlap", reason, captions[0], row.image)
                continue
            columns["caption"] = captions if self.source.lists else captions[0]
            columns["caption_tokens"] = max(count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), captions))
            columns[KEY] = _duplicate_key(self.settings.deduplicate, columns["sha256"], captions)
            clean.append({**row.extra, "id": row.id, **columns})
        return clean

    def _image_columns(self, data: bytes) -> dict[str, Any]:
        settings = self.settings.image
        image = usable_image(data, settings)
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

    def _overlap(self, columns: dict[str, Any]) -> tuple[str | None, int]:
        """Name of the first evaluation set that has the image, and the number of bits by which its hash differs."""
        for name, hashes in self.overlap.items():
            bits = hashes.nearest(columns["sha256"], int(columns["phash"], 16))
            if bits <= self.settings.overlap_distance:
                return name, bits
        return None, 0


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
        if not is_unicode(caption):
            raise DataError("caption is not valid Unicode: it contains half of a surrogate pair")
        if caption:
            captions.append(caption)
    if not captions:
        raise DataError("caption is empty")
    return captions


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
