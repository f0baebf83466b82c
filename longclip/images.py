"""From image bytes to pixels: the one transform that training, batch jobs and serving share.

The geometry is that of the Hugging Face CLIP image processor: short side to `image_size` with bicubic filtering, centre
crop. Workers send uint8 pixels, a quarter of the bytes of float32; normalisation happens where the model runs.
"""

import io
import math
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from longclip.errors import CheckpointError, ImageError

if TYPE_CHECKING:  # processes that only decode do not load torch
    from torch import Tensor

try:
    import simplejpeg
except ImportError:  # optional on machines that do not decode; Pillow gives the same pixels at half the speed
    simplejpeg = None

MAX_PIXELS = 64_000_000
"""Largest width x height to decode; larger files are decompression bombs, not photographs."""

MAX_ASPECT_RATIO = 100
"""Largest long side over short side: the short side is scaled, so a very thin image would become huge."""

MIN_FAST_SCALE = 1.5
"""Short side over target size from which ATen's resizing is within one grey level of Pillow's. Below it, ATen's 16-bit
weights are sometimes two levels off (8 of 1000 photographs of 160 pixels at 224), so Pillow is used."""

MAX_SCRATCH_BYTES = 64 * 1024 * 1024
ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
"""Names under which releases of transformers saved the same image processor."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB, upright by its EXIF orientation, on white where it is transparent.

    Args:
        data: an encoded image (JPEG, PNG, WebP, GIF, ...); the first frame of an animation is used.
        max_pixels: largest width x height, checked before decoding.

    Raises:
        ImageError: the bytes are not a complete image, or it is too large or too thin.
    """
    image = _decode(data, max_pixels, None)
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _decode(data: bytes, max_pixels: int, scratch: "_Scratch | None") -> Image.Image | np.ndarray:
    """RGB pixels `[H, W, 3]` uint8 of a plain JPEG, an RGB image of any other file.

    simplejpeg decodes plain JPEGs twice as fast as Pillow, into `scratch` if it is given and large enough.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about decompression bombs; the limit below refuses them
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"image has {width} x {height} pixels, at most {max_pixels} are allowed")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ImageError(
                    f"image has {width} x {height} pixels, sides of at most {MAX_ASPECT_RATIO} : 1 are allowed"
                )
            if image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) == 1:
                pixels = _decode_jpeg(data, width, height, scratch)
                if pixels is not None:
                    return pixels
            image.load()  # the EXIF of a PNG may follow its pixels
            method = UPRIGHT.get(_orientation(image))
            return _eight_bit(image if method is None else image.transpose(method)).convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise ImageError(f"image of {len(data)} bytes cannot be decoded: its format is unknown") from error
    except Image.DecompressionBombError as error:  # raised before the size can be asked for
        raise ImageError(f"image has far more than the {max_pixels} pixels that are allowed") from error
    except Exception as error:  # Pillow's plugins raise all kinds of errors on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"image of {len(data)} bytes cannot be decoded: {reason}") from error


def _decode_jpeg(data: bytes, width: int, height: int, scratch: "_Scratch | None") -> np.ndarray | None:
    """Pixels of a JPEG, identical to Pillow's; None if simplejpeg cannot guarantee that."""
    if simplejpeg is None:
        return None
    try:
        # Pillow's reading of the size was checked above. If the two parsers disagree about a file, the second must not
        # allocate more memory.
        if simplejpeg.decode_jpeg_header(data, strict=True)[:2] != (height, width):
            return None
        buffer = scratch.of_size(width * height * 3) if scratch else None
        # Fast upsampling saves 6 % and is up to 81 grey levels off at hard edges; the fast DCT saves 2 %, up to 255.
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True, buffer=buffer)
    except ValueError:
        return None  # damaged or unusual: Pillow decides which


class _Scratch(threading.local):
    """A buffer per thread for decoded pixels until they are resized. Allocating new memory for every photograph takes a
    third of its decoding time."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def of_size(self, size: int) -> bytearray | None:
        """A buffer of at least `size` bytes; None if that is too much to keep."""
        if size > MAX_SCRATCH_BYTES:
            return None
        if size > len(self.buffer):
            self.buffer = bytearray(size)
        return self.buffer


_SCRATCH = _Scratch()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where damaged EXIF hides it. Pillow's `exif_transpose` rewrites all EXIF, and fails at
    values that it cannot write."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image on white where it is transparent, like the Hugging Face processor, and with at most 8 bits.

    Raises:
        ImageError: its values have no known range. Pillow would clip them: a black or white image.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "I" and image.format == "PPM":  # Pillow scales these to 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" and low >= 0 and high <= 1:
            return Image.fromarray((values * 255).round().astype(np.uint8))
        if not (low >= 0 and high <= 255):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ImageError(
                f"image has {kind} pixels from {low:g} to {high:g}, whose range is unknown; convert it to 8 or 16 bits"
            )
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


@dataclass(frozen=True)
class ImageTransform:
    """How a checkpoint's images are resized, cropped and normalised."""

    image_size: int
    """Side S of the square that the model sees."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def pixels(self, data: bytes) -> np.ndarray:
        """Decode, resize and crop one image file to `[S, S, 3]` uint8; raises `ImageError`."""
        return self._fit(_decode(data, MAX_PIXELS, _SCRATCH))

    def pixels_and_image(self, data: bytes) -> tuple[np.ndarray, Image.Image]:
        """What `pixels` returns, and the whole RGB image it was made from, decoded once; raises `ImageError`."""
        decoded = _decode(data, MAX_PIXELS, None)
        return self._fit(decoded), Image.fromarray(decoded) if isinstance(decoded, np.ndarray) else decoded

    def _fit(self, decoded: Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(decoded, np.ndarray):
            if min(decoded.shape[:2]) >= MIN_FAST_SCALE * self.image_size:
                return self._resize_fast(decoded)
            decoded = Image.fromarray(decoded)
        return self.resize(decoded)

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize and crop a decoded RGB image to `[S, S, 3]` uint8."""
        size = self.image_size
        width, height, left, top = self._geometry(*image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + size, top + size)), dtype=np.uint8)

    def _resize_fast(self, pixels: np.ndarray) -> np.ndarray:
        """Like `resize` for `[H, W, 3]` uint8, with ATen's antialiased bicubic: Pillow's algorithm, vectorised.

        Within one grey level of it from `MIN_FAST_SCALE` on.
        """
        import torch
        import torch.nn.functional as F

        size = self.image_size
        width, height, left, top = self._geometry(pixels.shape[1], pixels.shape[0])
        channels_last = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(channels_last, (height, width), mode="bicubic", antialias=True)
        cropped = resized[0, :, top : top + size, left : left + size]
        return np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())

    def _geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height after resizing, then left and top of the crop."""
        short = min(width, height)
        width, height = int(self.image_size * width / short), int(self.image_size * height / short)
        return width, height, (width - self.image_size) // 2, (height - self.image_size) // 2

    def normalize(self, pixels: "Tensor") -> "Tensor":
        """`[N, S, S, 3]` uint8 on any device to normalised `[N, 3, S, S]` float32 on the same."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device) * 255
        std = torch.tensor(self.std, device=pixels.device) * 255
        return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()

    @classmethod
    def from_processor_config(cls, saved: Mapping[str, Any], image_size: int) -> "ImageTransform":
        """The transform of a Hugging Face `preprocessor_config.json`; settings that it lacks are those of CLIP.

        Args:
            saved: the content of the file.
            image_size: what the model's config requires.

        Raises:
            CheckpointError: it does something that this transform cannot do.
        """
        expected = cls(image_size).processor_config()
        default_side = 224  # of transformers' CLIPImageProcessor
        found = {**expected, "size": default_side, "crop_size": default_side}
        found |= {name: value for name, value in saved.items() if value is not None}
        if isinstance(found["size"], int):
            found["size"] = {"shortest_edge": found["size"]}
        if isinstance(found["crop_size"], int):
            found["crop_size"] = {"height": found["crop_size"], "width": found["crop_size"]}
        if found.get("feature_extractor_type", found["image_processor_type"]) in _CLIP_PROCESSORS:
            found["image_processor_type"] = expected["image_processor_type"]
        for name, value in found.items():
            chosen = name in ("do_convert_rgb", "do_normalize", "image_mean", "image_std")
            if chosen or not (name in expected or name.startswith("do_")):
                continue
            allowed = expected.get(name, False)
            if not (value == allowed or (name == "rescale_factor" and abs(value * 255 - 1) < 1e-4)):
                raise CheckpointError(f"its image processor has {name} = {value!r}; only {allowed!r} is supported")
        if not found["do_normalize"]:
            return cls(image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        mean, std = tuple(found["image_mean"]), tuple(found["image_std"])
        if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and min(std) > 0):
            raise CheckpointError(f"its image processor has image_mean = {mean}, image_std = {std}; give three of each")
        return cls(image_size, mean, std)

    def processor_config(self) -> dict[str, Any]:
        """The same transform as a Hugging Face `preprocessor_config.json`."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
