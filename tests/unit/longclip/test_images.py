"""From bytes to pixels: the same numbers as the Hugging Face processor, for any photograph, and no bombs."""

import importlib.util
import io
import struct
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

import longclip.images
from longclip.errors import DataError, ImageError
from longclip.images import MAX_PIXELS, ImageTransform, decode_image
from tests.support.pictures import picture

SIZES = [(32, 32), (33, 32), (32, 33), (31, 64), (100, 37), (37, 100), (1, 1), (5, 3), (1, 40), (500, 333), (333, 501)]
SIZES += [(64, 63), (97, 131), (480, 640), (641, 479), (17, 2), (1000, 35), (224, 225)]


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def by_hugging_face(transform: ImageTransform, image: Image.Image) -> torch.Tensor:
    """Pixels of the processor with its own defaults, of which only what a checkpoint decides is set."""
    side = transform.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=transform.mean,
        image_std=transform.std,
    )
    return torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))


def by_us(transform: ImageTransform, data: bytes) -> torch.Tensor:
    return transform.normalize(torch.from_numpy(transform.pixels(data))[None])


@pytest.mark.parametrize("side", [32, 33, 224])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_hugging_face_processor(size: tuple[int, int], side: int) -> None:
    data = picture(seed=sum(size), size=size)
    transform = ImageTransform(side)
    actual = by_us(transform, data)
    assert actual.shape == (1, 3, side, side)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, by_hugging_face(transform, decode_image(data)), rtol=0, atol=1e-6)


def test_saved_config_gives_the_same_processor() -> None:
    transform, image = ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), decode_image(picture(size=(97, 131)))
    saved = CLIPImageProcessorPil(**transform.processor_config())(image, return_tensors="np")["pixel_values"]
    assert torch.equal(torch.as_tensor(np.asarray(saved)), by_hugging_face(transform, image))


def test_custom_mean_and_deviation() -> None:
    transform = ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    data = picture(3)
    torch.testing.assert_close(
        by_us(transform, data), by_hugging_face(transform, decode_image(data)), rtol=0, atol=1e-6
    )
    black = transform.normalize(torch.zeros(2, 1, 1, 3, dtype=torch.uint8))
    torch.testing.assert_close(black[1, :, 0, 0], torch.tensor([-0.5 / 0.2, -0.4 / 0.3, -0.3 / 0.4]))


def _gradient(mode: str) -> Image.Image:
    return Image.linear_gradient("L").resize((60, 44)).convert(mode)


def _palette_with_transparency() -> bytes:
    image = _gradient("RGB").quantize(16)
    return encode(image, transparency=3)


def _sixteen_bit() -> bytes:
    return encode(Image.fromarray((np.arange(60 * 44, dtype=np.uint16) * 24).reshape(44, 60)))


def _half_transparent() -> bytes:
    image = _gradient("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize((60, 44)))
    return encode(image)


MODES: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encode(_gradient("CMYK"), "JPEG"),
    "palette with transparency": _palette_with_transparency,
    "gray": lambda: encode(_gradient("L")),
    "gray and alpha": lambda: encode(_gradient("LA")),
    "alpha": _half_transparent,
    "bits": lambda: encode(_gradient("1")),
    "YCbCr": lambda: encode(_gradient("YCbCr"), "JPEG"),
    "animation": lambda: encode(_gradient("P"), "GIF", save_all=True, append_images=[Image.new("P", (60, 44))]),
    "WebP": lambda: encode(_gradient("RGB"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    data = MODES[mode]()
    image = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (60, 44))
    assert np.asarray(image).std() > 10
    pixels = ImageTransform(32).pixels(data)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    with Image.open(io.BytesIO(data)) as raw:  # the processor converts by itself
        expected = by_hugging_face(ImageTransform(32), raw)
    torch.testing.assert_close(by_us(ImageTransform(32), data), expected, rtol=0, atol=1e-6)


def test_cmyk_colours_are_right() -> None:
    red = np.asarray(decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert (np.abs(red.astype(int) - (255, 0, 0)) < 6).all()


def test_transparent_pixels_become_white() -> None:
    assert np.asarray(decode_image(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))).min() == 255


def test_sixteen_bits_keep_their_contrast() -> None:
    # Unlike the processor, which clips them to 255 and so makes them white.
    values = np.asarray(decode_image(_sixteen_bit()))[..., 0].astype(int).reshape(-1)
    assert (np.diff(values) >= 0).all()
    assert len(np.unique(values)) > 150


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = _gradient("RGB")
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpose methods that EXIF readers undo
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, exif=exif)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (60, 44)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(upright))


def test_exif_that_cannot_be_rewritten_does_not_reject_an_image() -> None:
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"odd\0")  # a text where a rational number belongs
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    image = Image.open(io.BytesIO(picture(size=(40, 24))))
    data = encode(image, "JPEG", exif=tags)
    upright = Image.open(io.BytesIO(encode(image, "JPEG"))).transpose(Image.Transpose.ROTATE_270)
    assert decode_image(data).tobytes() == upright.tobytes()


def test_floating_point_and_wide_integer_pixels_are_scaled_or_rejected() -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)

    def grey(values: np.ndarray, image_format: str = "TIFF") -> np.ndarray:
        return np.asarray(decode_image(encode(Image.fromarray(values), image_format)).convert("L"))

    expected = (ramp * 255).round().astype(np.uint8)
    assert np.array_equal(grey(ramp), expected)
    assert np.array_equal(grey(expected.astype(np.float32)), expected)
    assert np.array_equal(grey(expected.astype(np.int32)), expected)
    with pytest.raises(ImageError, match="floating-point pixels from -3 to 97, whose range is unknown"):
        grey(ramp * 100 - 3)
    with pytest.raises(ImageError, match="32-bit pixels from 0 to 65535, whose range is unknown"):
        grey((ramp * 65535).astype(np.int32))
    plain = b"P5 8 8 65535 " + (ramp * 65535).astype(">u2").tobytes()
    assert np.abs(np.asarray(decode_image(plain).convert("L")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_files(image_format: str) -> None:
    data = picture(size=(200, 150), image_format=image_format)
    for size in (0, 3, 20, len(data) // 2, len(data) - 40):
        with pytest.raises(ImageError) as error:
            decode_image(data[:size])
        assert "\n" not in str(error.value)
        assert isinstance(error.value, DataError)


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_no_images(data: bytes) -> None:
    with pytest.raises(ImageError, match=f"{len(data)} bytes cannot be decoded"):
        decode_image(data)


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_rejected_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for width, height in ((MAX_PIXELS, 2), (60_000, 60_000), (8001, 8000)):
        with pytest.raises(ImageError, match=r"\d pixels"):  # by our limit, or by Pillow's own at opening
            decode_image(_png_that_claims(width, height))


def test_pixel_limit_is_exact() -> None:
    data = picture(size=(40, 36))
    assert decode_image(data, max_pixels=40 * 36).size == (40, 36)
    with pytest.raises(ImageError, match="at most 1439"):
        decode_image(data, max_pixels=40 * 36 - 1)


JPEGS: dict[str, dict[str, object]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "poor": {"quality": 20},
}


@pytest.mark.parametrize("size", [(333, 500), (640, 481), (17, 23), (1, 1)])
@pytest.mark.parametrize("kind", [*JPEGS, "grey"])
def test_simplejpeg_decodes_the_pixels_of_pillow(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = _gradient("RGB").resize(size)
    data = encode(image.convert("L"), "JPEG") if kind == "grey" else encode(image, "JPEG", **JPEGS[kind])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def load(*_: object) -> None:
        raise AssertionError("decoded by Pillow")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", load)
        decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded), expected)


def test_pixels_are_the_same_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("images_without_simplejpeg", longclip.images.__file__)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, other)
    spec.loader.exec_module(other)
    data = encode(_gradient("RGB").resize((333, 500)), "JPEG")
    assert np.array_equal(other.ImageTransform(64).pixels(data), ImageTransform(64).pixels(data))


def test_jpeg_with_trailing_bytes_is_read() -> None:
    data = encode(_gradient("RGB"), "JPEG")
    assert np.array_equal(np.asarray(decode_image(data + bytes(50))), np.asarray(decode_image(data)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_raise_only_image_errors(image_format: str) -> None:
    data = encode(_gradient("RGB"), image_format)
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, min(len(data), 700), 6):
            damaged[place] = generator.integers(0, 256)
        try:
            image = decode_image(bytes(damaged), max_pixels=1_000_000)
            outcomes.add("read")
            assert image.width * image.height <= 1_000_000
            ImageTransform(32).resize(image)
        except ImageError:
            outcomes.add("refused")
    assert "refused" in outcomes


def photograph_like(seed: int, size: tuple[int, int]) -> Image.Image:
    """Large soft shapes with some grain, as cameras see."""
    generator = np.random.default_rng(seed)
    shapes = Image.fromarray(generator.integers(0, 255, (size[1] // 40, size[0] // 40, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)) + generator.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("side", [32, 224, 336])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (200, 200), (1000, 130), (1500, 1000)])
def test_photographs_are_equal_within_one_grey_level(size: tuple[int, int], side: int) -> None:
    data = encode(photograph_like(sum(size), size), "JPEG", quality=90)
    transform = ImageTransform(side)
    slow = transform.resize(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    difference = np.abs(transform.pixels(data) - slow)
    assert difference.max() <= 1
    assert difference.mean() < 0.02
