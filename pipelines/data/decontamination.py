"""Decontamination: hashes of the images in evaluation sets, so that copies of them are left out."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import imagehash
import numpy as np

from longclip.errors import DataError, ImageError
from longclip.images import decode_image
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import Rejected
from pipelines.data.settings import EvaluationSet, PrepareSettings
from pipelines.data.sources.source import Piece, Source, planned_pieces, read_piece
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace


class ImageHashes:
    """Hashes of the images in an evaluation set."""

    def __init__(self, sha256: set[str], perceptual: np.ndarray) -> None:
        """
        Args:
            sha256: hex digests of image files.
            perceptual: `[M]` uint64 perceptual hashes.
        """
        self.sha256, self.perceptual = sha256, perceptual

    def nearest(self, sha256: str, perceptual: int) -> int:
        """Number of bits that differ between an image and the most similar one; 0 for the same file."""
        if sha256 in self.sha256:
            return 0
        return int(np.bitwise_count(self.perceptual ^ np.uint64(perceptual)).min())


class HashPiece:
    """Hashes the images of a piece of an evaluation set. Their captions do not matter."""

    def __init__(self, source: Source, field: str, max_pixels: int) -> None:
        """
        Args:
            source: the evaluation set.
            field: setting that names it, for messages.
            max_pixels: maximum width x height of an image.
        """
        self.source, self.field, self.max_pixels = source, field, max_pixels

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Hash a piece; see `pipelines.data.work_units.UnitTask`. The result has the hashes, and the first reason why
        an image cannot be read."""
        piece = Piece(**unit)
        rejected = Rejected(piece.origin)
        sha256, perceptual, rows_in = [], [], 0
        for row in read_piece(self.source, self.field, piece):
            rows_in += 1
            try:
                if not row.image:
                    raise ImageError(row.problem or "image is empty")
                perceptual.append(str(imagehash.phash(decode_image(row.image, self.max_pixels))))
                sha256.append(hashlib.sha256(row.image).hexdigest())
            except ImageError as error:
                rejected.add(row.id, "overlap", str(error))
        return {
            "rows_in": rows_in,
            "rows_out": len(sha256),
            "rejected": len(rejected),
            "first_rejected": rejected.first,
            "sha256": sha256,
            "phash": perceptual,
        }


def set_field(name: str) -> str:
    """Setting with the path of an evaluation set."""
    return f"exclude_overlap_with.{name}.input"


def hash_images(
    work: Workspace, settings: PrepareSettings, sources: Mapping[str, Source], progress: Progress
) -> dict[str, ImageHashes]:
    """Hashes of the images of each evaluation set.

    Raises:
        DataError: more images of one than allowed cannot be read: copies of them would stay in the output.
    """
    hashes = {}
    for number, (name, source) in enumerate(sources.items()):
        stage, field, evaluation = f"overlap-{number}", set_field(name), settings.exclude_overlap_with[name]
        plan = work.planned(stage, partial(planned_pieces, source, field, evaluation.input))
        task = HashPiece(source, field, settings.image.max_pixels)
        results = run_units(work, stage, plan, task, progress)
        _check_readable(name, evaluation, results)
        perceptual = [int(value, 16) for result in results for value in result["phash"]]
        sha256 = {value for result in results for value in result["sha256"]}
        hashes[name] = ImageHashes(sha256, np.array(perceptual, dtype=np.uint64))
    return hashes


def _check_readable(name: str, evaluation: EvaluationSet, results: list[dict[str, Any]]) -> None:
    images, unreadable = (sum(result[count] for result in results) for count in ("rows_in", "rejected"))
    if unreadable < images and unreadable <= evaluation.max_unreadable_fraction * images:
        return
    group = f"exclude_overlap_with.{name}"
    if not images:
        raise DataError(f"{set_field(name)}='{evaluation.input}' has no images; give an evaluation set that has some")
    first = next(result["first_rejected"] for result in results if result["first_rejected"])
    accept = f", or accept it with --set {group}.max_unreadable_fraction=<share>" if unreadable < images else ""
    raise DataError(
        f"{set_field(name)}='{evaluation.input}': {unreadable} of {images} images cannot be read, more than"
        f" max_unreadable_fraction={evaluation.max_unreadable_fraction} allows, and copies of them would stay in the"
        f" output; the first is {first}; fix the set or how it is read ({group}.source.images,"
        f" {group}.source.image){accept}"
    )
