"""Decoding the items of a request: texts to tokens, images to pixels.

This happens before items of several requests are batched together, so an item that cannot be decoded fails only its own
request.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from longclip.errors import ImageError
from longclip.images import MAX_ASPECT_RATIO, MAX_PIXELS, ImageTransform
from longclip.tokenizer import TokenBatch, count_tokens, tokenize
from serving.errors import ApiError
from serving.limits import MAX_IMAGE_BYTES, MAX_TEXT_CHARS

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def decode_texts(
    tokenizer: CLIPTokenizer, texts: Sequence[str], params: Sequence[str], truncate: bool
) -> tuple[TokenBatch, int]:
    """Tokenize N texts; returns the tokens and the number of truncated texts.

    Args:
        tokenizer: tokenizer of the model; its `model_max_length` is the context length.
        texts: N texts, at least one.
        params: N positions in the request, such as `input[3]`, for error messages.
        truncate: cut texts longer than the context; otherwise they are refused.

    Raises:
        ApiError: a text is empty, too long, or not valid Unicode.
    """
    for text, param in zip(texts, params, strict=True):
        check_text(text, param)
        if not text.strip():
            raise ApiError(422, f"{param}: the text is empty", "empty_text", param)
    tokens = tokenize(tokenizer, texts)
    too_long = (tokens.full_lengths > tokens.lengths).nonzero().flatten().tolist()
    if too_long and not truncate:
        first = too_long[0]
        raise ApiError(
            422,
            f"{params[first]}: the text has {int(tokens.full_lengths[first])} tokens, the model reads"
            f" {tokenizer.model_max_length}; shorten it, or set truncate to cut it",
            "context_length_exceeded",
            params[first],
        )
    return tokens, len(too_long)


def check_text(text: str, param: str) -> None:
    """Raise `ApiError` for a text that cannot be tokenized, or would take too long to."""
    if len(text) > MAX_TEXT_CHARS:
        message = f"{param}: the text has {len(text)} characters, at most {MAX_TEXT_CHARS} are allowed"
        raise ApiError(413, message, "text_too_long", param)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
        raise ApiError(422, f"{param}: the text is not valid Unicode", "invalid_text", param) from None


def token_count(tokenizer: CLIPTokenizer, text: str) -> int:
    """Number of tokens of a whole text, including the start and end tokens."""
    check_text(text, "text")
    return count_tokens(tokenizer, [text])[0]


def decode_image_file(transform: ImageTransform, data: bytes, param: str) -> np.ndarray:
    """Pixels `[S, S, 3]` uint8 of an image file; raises `ApiError`."""
    try:
        _check_header(data, param)
        return transform.pixels(data)
    except ImageError as error:
        raise ApiError(422, f"{param}: {error}", "invalid_image", param) from error


def decode_base64_image(transform: ImageTransform, image: str, param: str) -> np.ndarray:
    """Pixels `[S, S, 3]` uint8 of an image file as a data URI or base64 string; raises `ApiError`."""
    return decode_image_file(transform, _image_bytes(image, param), param)


def _image_bytes(image: str, param: str) -> bytes:
    uri = _DATA_URI.match(image)
    if uri is None and ":" in image[:16]:
        message = f"{param}: give a data:image/...;base64,... URI or raw base64; this server does not fetch this URL"
        raise ApiError(422, message, "invalid_image", param)
    encoded = image[uri.end() :] if uri else image
    if len(encoded) // 4 * 3 > MAX_IMAGE_BYTES:
        raise ApiError(
            413, f"{param}: the image is larger than {MAX_IMAGE_BYTES} bytes; scale it down", "image_too_large", param
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, f"{param}: the image is not valid base64", "invalid_image", param) from error


def _check_header(data: bytes, param: str) -> None:
    """Raise `ApiError` for an image that is too large to decode or in a rarely used format, before decoding it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about decompression bombs; the limits below refuse them
            width, height = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size
    except Image.DecompressionBombError:
        message = f"{param}: the image has more than {MAX_PIXELS} pixels; scale it down"
        raise ApiError(413, message, "image_too_large", param) from None
    except Exception as error:  # Pillow's plugins raise almost anything on broken files
        message = f"{param}: the {len(data)} bytes are not an image in any of {', '.join(IMAGE_FORMATS)}"
        raise ApiError(422, message, "invalid_image", param) from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        message = (
            f"{param}: the image has {width} x {height} pixels; at most {MAX_PIXELS} and sides of at most"
            f" {MAX_ASPECT_RATIO} : 1 are allowed"
        )
        raise ApiError(413, message, "image_too_large", param)
