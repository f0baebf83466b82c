"""From image bytes to pixels: the one transform that training, batch jobs and serving share.

The geometry is that of the Hugging Face CLIP image processor: short side to `image_size` with bicubic filtering, centre
crop. Workers hand over uint8; normalisation happens where the model runs, which is a quarter of the traffic.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from longclip.errors import ImageError

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded: above it lie decompression bombs, not photographs."""

MAX_ASPECT_RATIO = 100
"""Largest long side over short side: the short side is scaled, so a thread of an image would become a huge one."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB, upright by its EXIF orientation, on white where it is transparent.

    Args:
        data: an encoded image (JPEG, PNG, WebP, GIF, ...); of an animation, the first frame.
        max_pixels: largest width x height, checked before anything is decoded.

    Raises:
        ImageError: the bytes are no complete image, or it is too large or too thin.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; the limit below refuses them
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"image has {width} x {height} pixels, at most {max_pixels} are allowed")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ImageError(
                    f"image has {width} x {height} pixels, sides of at most {MAX_ASPECT_RATIO} : 1 are allowed"
                )
            return _opaque(ImageOps.exif_transpose(image)).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"image of {len(data)} bytes cannot be decoded: {reason}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """The image on white where it is transparent, as the Hugging Face processor has it, and with at most 8 bits."""
    if image.mode.startswith("I;16"):  # Pillow would clip to 255 instead of scaling: a white image
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


@dataclass(frozen=True)
class ImageTransform:
    """How a checkpoint wants its images."""

    image_size: int
    """Side S of the square that the model sees."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def pixels(self, data: bytes) -> np.ndarray:
        """Decode, resize and crop one image file to `[S, S, 3]` uint8; raises `ImageError`."""
        return self.resize(decode_image(data))

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize and crop a decoded RGB image to `[S, S, 3]` uint8."""
        size = self.image_size
        width, height = image.size
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + size, top + size)), dtype=np.uint8)

    def normalize(self, pixels: Tensor) -> Tensor:
        """`[N, S, S, 3]` uint8 on any device to normalised `[N, 3, S, S]` float32 on the same."""
        mean = torch.tensor(self.mean, device=pixels.device) * 255
        std = torch.tensor(self.std, device=pixels.device) * 255
        return ((pixels.float() - mean) / std).permute(0, 3, 1, 2).contiguous()

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
