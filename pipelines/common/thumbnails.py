"""Small JPEGs of images, for reports."""

import io

from longclip.errors import ImageError
from longclip.images import decode_image

SIDE = 192


def thumbnail(data: bytes) -> bytes | None:
    """A JPEG with sides of at most `SIDE` pixels; None if the image cannot be decoded."""
    try:
        image = decode_image(data)
    except ImageError:
        return None
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
