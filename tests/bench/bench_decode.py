"""Encoded JPEG -> 224 x 224 pixels, on one core: `longclip.ImageTransform` against Pillow.

The rival is what CLIP's own preprocessing does: Pillow decodes, resizes (bicubic) and crops. Both get the same files.
First they are compared: more than one grey level of difference ends the benchmark with exit code 1.

    python tests/bench/bench_decode.py [--quick]

The last line is JSON; `ratio` is the smallest of the ratios of images per second, ours over Pillow's.
"""

import io
import sys
from functools import partial

import numpy as np
import torch
from PIL import Image

from harness import alternating, arguments, report
from longclip.images import ImageTransform
from photographs import photograph

SIDE = 224
SIZES = {(384, 288): 160, (640, 480): 80, (2250, 1500): 8}
"""Width and height of the files -> files in a round."""


def pillow(data: bytes) -> np.ndarray:
    """What CLIP's preprocessing does before it normalises."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = int(SIDE * image.width / short), int(SIDE * image.height / short)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))


def main() -> None:
    """Compare, measure, report."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    ours = ImageTransform(SIDE).pixels
    figures = {}
    for (width, height), count in SIZES.items():
        files = [photograph(width, height, seed) for seed in range(4)]
        difference = max(int(np.abs(ours(data).astype(int) - pillow(data)).max()) for data in files)
        if difference > 1:
            sys.exit(f"error: {width} x {height}: pixels differ by {difference} grey levels")
        work = files * (count // 8 if quick else count // 4)

        def run(decode: object, work: list[bytes] = work) -> None:
            for data in work:
                decode(data)  # type: ignore[operator]

        seconds = alternating({"pillow": partial(run, pillow), "ours": partial(run, ours)}, 5 if quick else 9)
        figures[f"{width}x{height}"] = {
            "kilobytes": len(files[0]) // 1000,
            "pillow_images_per_second": round(len(work) / seconds["pillow"], 1),
            "ours_images_per_second": round(len(work) / seconds["ours"], 1),
            "ratio": round(seconds["pillow"] / seconds["ours"], 2),
            "max_difference": difference,
        }
        print(f"{width} x {height}: {figures[f'{width}x{height}']}", flush=True)
    report("decode", quick, ratio=min(figures[size]["ratio"] for size in ("640x480", "2250x1500")), sizes=figures)


if __name__ == "__main__":
    main()
