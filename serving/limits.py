"""Limits of one request and of one replica. `GET /info` shows those of a request."""

from longclip.constants import MAX_IMAGE_BYTES, MAX_TEXT_CHARS
from longclip.images import MAX_PIXELS

MAX_BODY_BYTES = 64 * 2**20
BODY_SECONDS = 30.0
"""Maximum time for a request body to arrive."""
MAX_TEXTS = 2048
MAX_IMAGES = 32

MAX_REQUESTS = 256
MAX_BYTES_IN_FLIGHT = 512 * 2**20
"""Maximum number of requests in progress on a replica, and of bytes in their bodies."""

REQUEST_LIMITS = {
    "body_bytes": MAX_BODY_BYTES,
    "texts": MAX_TEXTS,
    "images": MAX_IMAGES,
    "text_chars": MAX_TEXT_CHARS,
    "image_bytes": MAX_IMAGE_BYTES,
    "image_pixels": MAX_PIXELS,
}
