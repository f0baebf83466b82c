"""Images that jobs on data use: decoded, and within the limits of their settings."""

from PIL import Image

from longclip.errors import ImageError
from longclip.images import decode_image
from pipelines.data.settings import ImageLimits


def usable_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode an image file, upright and RGB.

    Raises:
        ImageError: it cannot be decoded, or is too large or too small.
    """
    if not data:
        raise ImageError("image is empty")
    image = decode_image(data, limits.max_pixels)
    if min(image.size) < limits.min_side:
        raise ImageError(
            f"image has {image.width} x {image.height} pixels; sides of at least {limits.min_side} are required"
        )
    return image
