"""Rows as the world sends them: odd ones that must be kept, and broken ones that must be refused with a reason."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.pictures import picture


def photograph(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture with large shapes, different for each seed."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """An image file."""
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def jpeg(seed: int) -> bytes:
    """A plain photograph."""
    return encoded(photograph(seed), quality=90)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is as large as that, and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def rotated(seed: int) -> bytes:
    """A JPEG that is upright only with its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(seed), exif=exif.tobytes())


def animation(seed: int) -> bytes:
    """A GIF of three frames."""
    frames = [photograph(seed + number) for number in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bit(seed: int) -> bytes:
    """A grey PNG with 16 bits a pixel."""
    grey = np.asarray(photograph(seed).convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


ODD_IMAGES = {
    "cmyk": lambda seed: encoded(photograph(seed).convert("CMYK")),
    "palette": lambda seed: encoded(photograph(seed).convert("P"), "PNG"),
    "16-bit": sixteen_bit,
    "rotated": rotated,
    "animated": animation,
    "transparent": lambda seed: encoded(photograph(seed).convert("RGBA"), "PNG"),
    "grey": lambda seed: encoded(photograph(seed).convert("L")),
    "progressive": lambda seed: encoded(photograph(seed), progressive=True),
    "webp": lambda seed: encoded(photograph(seed), "WEBP"),
    "bilevel": lambda seed: encoded(photograph(seed).convert("1"), "PNG"),
    "trailing bytes": lambda seed: jpeg(seed) + b"\0" * 100,
}
"""Kinds of images that are unusual and usable: seed -> file."""

BROKEN_IMAGES = {
    "truncated JPEG": (lambda seed: jpeg(seed)[: len(jpeg(seed)) // 2], "cannot be decoded"),
    "truncated PNG": (lambda seed: picture(seed)[:300], "cannot be decoded"),
    "damaged PNG": (lambda seed: picture(seed)[:200] + b"damage" + picture(seed)[206:], "cannot be decoded"),
    "truncated WebP": (lambda seed: encoded(photograph(seed), "WEBP")[:100], "cannot be decoded"),
    "header only": (lambda seed: jpeg(seed)[:20], "cannot be decoded"),
    "web page": (lambda seed: b"<!doctype html><title>404 Not Found</title>", "cannot be decoded"),
    "drawing": (lambda seed: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "cannot be decoded"),
    "zeros": (lambda seed: bytes(500), "cannot be decoded"),
    "noise": (lambda seed: np.random.default_rng(seed).bytes(500), "cannot be decoded"),
    "empty": (lambda seed: b"", "image is empty"),
    "absent": (lambda seed: None, "image"),
    "bomb": (lambda seed: png_header(30_000, 30_000), " pixels"),
    "thread": (lambda seed: png_header(20_000, 17), "sides of at most 100 : 1"),
    "spacer": (lambda seed: encoded(photograph(seed, (1, 1)), "PNG"), "sides of at least 16"),
}
"""Kinds of images that cannot be used: (seed -> file, part of the reason)."""

BROKEN_CAPTIONS = {
    "no caption": (None, "caption"),
    "blank caption": (" \n\t ", "caption is empty"),
    "endless caption": ("word " * 10_000, "caption has 49999 characters; at most 20000"),
}
"""Kinds of captions that cannot be used: (caption, part of the reason)."""
