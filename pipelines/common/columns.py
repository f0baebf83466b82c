"""Columns of a Parquet of images and texts, and what their cells hold."""

from typing import Any

from longclip.errors import ImageError
from pipelines.common.settings import Settings


class Columns(Settings):
    """Names of the columns."""

    id: str = "id"
    """Unique key of a row."""
    image: str = "image"
    """Encoded image file (JPEG, PNG, WebP, ...) as binary."""
    caption: str = "caption"
    """Long text."""
    summary: str = "summary"
    """Short text."""


def cell_texts(cell: Any) -> list[str]:
    """The texts of a cell that holds a string or a list of strings, without empty ones."""
    texts = [cell] if isinstance(cell, str) else list(cell) if cell is not None else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


def image_bytes(cell: Any) -> bytes:
    """The image file in a cell: binary, or the `{bytes, path}` struct of Hugging Face datasets.

    Raises:
        ImageError: the cell holds no bytes.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes | bytearray) or not cell:
        raise ImageError("image cell holds no bytes")
    return bytes(cell)
