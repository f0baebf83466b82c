"""Small pictures of large ones, for the hits of a search."""

import io
from typing import Any

import numpy as np

from longclip.errors import ImageError
from longclip.images import decode_image
from pipelines.common.model_inputs import image_bytes
from pipelines.common.rejected_rows import Columns

THUMBNAIL_SIDE = 256


class AddThumbnails:
    """Adds a `thumbnail` (JPEG, at most `THUMBNAIL_SIDE` pixels a side); empty where the image cannot be read."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with thumbnails."""
        return batch | {"thumbnail": [self._thumbnail(cell) for cell in batch[self.columns.image]]}

    def _thumbnail(self, cell: Any) -> bytes:
        try:
            image = decode_image(image_bytes(cell))
        except ImageError:
            return b""  # the row is rejected, with its reason, where its pixels are made
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        return out.getvalue()
