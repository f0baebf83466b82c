"""The registered model as an MLflow pyfunc: texts and images in, unit-length embeddings out.

MLflow runs this file when it loads the model ("models from code"): nothing is unpickled. It imports only `longclip`,
which the model carries, and what the model's requirements name.
"""

import base64
import binascii
import math
import re
from collections.abc import Mapping
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException

from longclip.checkpoint import load_checkpoint, verify_checkpoint
from longclip.constants import MAX_IMAGE_BYTES, MAX_TEXT_CHARS
from longclip.encode import encode_image, encode_text, unit
from longclip.errors import ImageError
from longclip.tokenizer import tokenize

TEXT, IMAGE = "text", "image"
BATCH = {TEXT: 1024, IMAGE: 32}
ACCEPTED = f"give texts, or rows with a '{TEXT}' or an '{IMAGE}' (base64 of an image file)"

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


class Embedder:
    """Embeds texts and images."""

    def load_context(self, context: Any) -> None:
        """Load the registered checkpoint, if its files are those that were written."""
        verify_checkpoint(context.artifacts["checkpoint"])
        self.checkpoint = load_checkpoint(context.artifacts["checkpoint"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Embeddings of N rows as N lists of D numbers; of no rows, an empty list.

        Args:
            context: not used.
            model_input: a text; a list, array or Series of texts; a list of dicts, a dict of columns or a DataFrame
                with `text` or `image` (base64 or bytes of an image file) in each row.
            params: `truncate`: cut texts that are longer than the model reads, instead of refusing them.

        Raises:
            MlflowException: a row cannot be embedded; the message is one line that names it.
        """
        rows = _rows(model_input)
        truncate = bool((params or {}).get("truncate", False))
        vectors: list[list[float]] = [[] for _ in rows]
        for kind, embed in ((TEXT, self._texts), (IMAGE, self._images)):
            numbers = [number for number, (row_kind, _) in enumerate(rows) if row_kind == kind]
            for start in range(0, len(numbers), BATCH[kind]):
                part = numbers[start : start + BATCH[kind]]
                with torch.inference_mode():
                    features = embed({number: rows[number][1] for number in part}, truncate)
                for number, vector in zip(part, unit(features).tolist(), strict=True):
                    vectors[number] = vector
        return vectors

    def _texts(self, texts: Mapping[int, Any], truncate: bool) -> torch.Tensor:
        for number, text in texts.items():
            _check_text(number, text)
        tokens = tokenize(self.checkpoint.tokenizer, list(texts.values()), self.checkpoint.context_length)
        for number, length, full in zip(texts, tokens.lengths.tolist(), tokens.full_lengths.tolist(), strict=True):
            if full > length and not truncate:
                raise _refused(
                    f"row {number}: the text has {full} tokens, the model reads {length}; shorten it, or set the"
                    " parameter truncate to cut it"
                )
        return encode_text(self.checkpoint.model, tokens)

    def _images(self, images: Mapping[int, Any], truncate: bool) -> torch.Tensor:
        transform = self.checkpoint.transform
        pixels = []
        for number, image in images.items():
            try:
                pixels.append(transform.pixels(_image_bytes(number, image)))
            except ImageError as error:
                raise _refused(f"row {number}: {error}") from error
        return encode_image(self.checkpoint.model, transform.normalize(torch.from_numpy(np.stack(pixels))))


def _rows(data: Any) -> list[tuple[str, Any]]:
    """(`text` or `image`, value) of each row of an input."""
    if hasattr(data, "columns"):  # a DataFrame
        names = list(data.columns)
        if names == [0]:  # MLflow's `dataframe_split` without columns
            return _rows(data[0])
        if len(set(names)) < len(names):
            raise _refused(f"the input has two columns of the same name among {names}; {ACCEPTED}")
        return _rows_of_columns({name: data[name].tolist() for name in names})
    if isinstance(data, Mapping):
        return _rows_of_columns({name: _values(value) for name, value in data.items()})
    kind = IMAGE if getattr(data, "name", None) == IMAGE else TEXT  # a Series may say that it holds images
    return [_row(number, value, kind) for number, value in enumerate(_values(data))]


def _rows_of_columns(columns: Mapping[Any, list[Any]]) -> list[tuple[str, Any]]:
    _check_names("the input has the column", columns)
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = " and ".join(f"{length} of '{name}'" for name, length in lengths.items())
        raise _refused(f"the columns differ in length ({counts}); give one value of each for each row")
    return [
        _row(number, dict(zip(columns, values, strict=True)), TEXT)
        for number, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _row(number: int, value: Any, kind: str) -> tuple[str, Any]:
    value = _scalar(value)
    if not isinstance(value, Mapping):
        if _is_null(value):
            raise _refused(f"row {number} is empty; {ACCEPTED}")
        return kind, value
    _check_names(f"row {number} has", value)
    given = {name: _scalar(item) for name, item in value.items() if not _is_null(_scalar(item))}
    if len(given) != 1:
        count = f"both '{TEXT}' and '{IMAGE}'" if given else f"neither '{TEXT}' nor '{IMAGE}'"
        raise _refused(
            f"row {number} has {count}; give one of them. MLflow merges the rows of 'instances': send texts and images"
            " together as 'inputs' or 'dataframe_records'"
        )
    ((name, item),) = given.items()
    return name, item


def _check_names(subject: str, names: Mapping[Any, Any]) -> None:
    if unknown := [name for name in names if name not in (TEXT, IMAGE)]:
        raise _refused(f"{subject} '{unknown[0]}'; {ACCEPTED}")


def _values(data: Any) -> list[Any]:
    """Elements of a list, an array of one dimension or one column, or a Series; a scalar is one element."""
    data = data.tolist() if hasattr(data, "tolist") else data
    if isinstance(data, tuple):
        data = list(data)
    if not isinstance(data, list):
        return [data]
    return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]


def _scalar(value: Any) -> Any:
    """An element without its array of no dimension: MLflow's server makes one of every value of a dict."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _check_text(number: int, text: Any) -> None:
    if not isinstance(text, str):
        raise _refused(f"row {number} is of type {type(text).__name__}, not a text; {ACCEPTED}")
    if not text.strip():
        raise _refused(f"row {number}: the text is empty; leave the row out")
    if len(text) > MAX_TEXT_CHARS:
        raise _refused(f"row {number}: the text has {len(text)} characters, at most {MAX_TEXT_CHARS} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
        raise _refused(f"row {number}: the text is not valid Unicode") from None


def _image_bytes(number: int, image: Any) -> bytes:
    if isinstance(image, str):
        encoded = image[match.end() :] if (match := _DATA_URI.match(image)) else image
        _check_size(number, len(encoded) // 4 * 3)
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise _refused(f"row {number}: the image is not valid base64; encode the bytes of an image file") from None
    if not isinstance(image, bytes):
        raise _refused(f"row {number}: the image is of type {type(image).__name__}; give base64 of an image file")
    _check_size(number, len(image))
    return image


def _check_size(number: int, size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise _refused(f"row {number}: the image has more than {MAX_IMAGE_BYTES} bytes; scale it down")


def _refused(message: str) -> MlflowException:
    """An error that MLflow's server answers with status 400."""
    return MlflowException.invalid_parameter_value(message)


class Model(Embedder, mlflow.pyfunc.PythonModel):
    """The embedder for MLflow.

    Annotations of `predict` would make MLflow derive a signature that accepts fewer kinds of input. Without them it
    warns about a `predict` that is defined in this class.
    """


mlflow.models.set_model(Model())
