"""Cells of Parquet columns: the forms in which images and captions are stored, and which types hold the same."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from pipelines.common.parquet_set import is_list_type
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES

MAX_PATH_BYTES = 4096
SPEAKERS = {"from", "role"}
"""Field of the turns of a conversation, whose caption is one text."""


def image_cell(cell: Any) -> tuple[bytes | str | None, str | None]:
    """Bytes of an image or a reference to it (None if there is neither), and the problem with the cell.

    Args:
        cell: bytes, also as numbers; a path or URI; Hugging Face's `{bytes, path}`; or a list of one of these.
    """
    if isinstance(cell, dict):
        content = cell.get("bytes")
        return image_cell(cell.get("path") if content is None else content)
    if isinstance(cell, list):
        images = [image for image in cell if image is not None]
        if any(isinstance(image, list) for image in images):
            return None, "image is an array of pixels, not an image file"
        if images and all(isinstance(image, int) for image in images):
            if len(images) == len(cell) and min(images) >= 0 and max(images) <= 255:
                return bytes(images), None
            return None, "image is a list of numbers that are not bytes (0 to 255)"
        if len(images) > 1:
            return None, f"row has {len(images)} images; give one image per row"
        return image_cell(images[0]) if images else (None, None)
    if isinstance(cell, bytes):
        return (cell.decode() if _is_reference(cell) else cell), None
    if cell is None or isinstance(cell, str):
        return cell, None
    return None, f"image is neither bytes nor a path or URI but {type(cell).__name__}"


def _is_reference(content: bytes) -> bool:
    """Whether bytes are a path or URI, as old writers of Parquet, which do not mark texts, store it."""
    if len(content) > MAX_PATH_BYTES:
        return False
    text = content.decode(errors="replace")
    return text.isprintable() and "\ufffd" not in text and (text.lower().endswith(IMAGE_SUFFIXES) or "://" in text[:10])


def bytes_of_lists(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """The batch with a column of lists of 8-bit numbers as bytes: as Python numbers, they would need 8 times as much
    memory."""
    column = batch[name]
    if not is_list_type(column.type) or column.type.value_type not in (pa.uint8(), pa.int8()):
        return batch
    values = [
        cell.values.to_numpy().view(np.uint8).tobytes() if cell.is_valid and not cell.values.null_count else None
        for cell in column
    ]
    return batch.set_column(batch.schema.get_field_index(name), name, pa.array(values, pa.large_binary()))


def holds_lists(kind: pa.DataType) -> bool:
    """Whether the captions of a column of this type are lists: of texts or of structs, or a struct of lists. The list
    of the turns of a conversation is not."""
    if kinds.is_struct(kind):
        return all(is_list_type(field.type) for field in kind) and not SPEAKERS & {field.name for field in kind}
    if not is_list_type(kind):
        return False
    value = kind.value_type
    return not (kinds.is_struct(value) and SPEAKERS & {field.name for field in value})


def like(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether the cells of two types are read in the same way: texts and bytes of all kinds, integers of all widths."""
    if kinds.is_null(a) or kinds.is_null(b) or a == b:
        return True
    if kinds.is_dictionary(a) or kinds.is_dictionary(b):
        return like(*(kind.value_type if kinds.is_dictionary(kind) else kind for kind in (a, b)))
    if is_list_type(a) and is_list_type(b):
        return like(a.value_type, b.value_type)
    return (_is_text(a) and _is_text(b)) or (kinds.is_integer(a) and kinds.is_integer(b))


def _is_text(kind: pa.DataType) -> bool:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names or kinds.is_fixed_size_binary(kind)
