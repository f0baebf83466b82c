"""Memory and time of one training step, plain and with gradient caching, on the same batch.

Rivals are the two ways of `longclip.training.step.backward`: `plain` holds the activations of the whole batch, `cached`
those of 32 pairs. Each runs in a process of its own, with one thread; memory is what the process holds at most, less
what it held before, and time is CPU time.
The gradients must agree to 1e-5 (float32, all parameters together), else exit code 1.

    python tests/bench/bench_gradcache.py [--quick]

The last line is JSON; `ratio` is plain's memory over cached's and `time_ratio` cached's time over plain's, at a batch
that both can do; `largest` is one that is cached only. Linux.
"""

import multiprocessing
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from harness import arguments, report
from longclip.images import ImageTransform
from longclip.training.loss import LossConfig
from longclip.training.step import PairEncoder, backward
from step_rivals import LENGTH, batch_of


def memory(field: str) -> float:
    """MiB of this process: `VmRSS` now, or `VmHWM`, the most since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def step(batch_size: int, chunk_size: int | None, result: str) -> None:
    """One step of a small CLIP (4 + 4 layers, width 192, images of 224); its figures and gradients go to a file."""
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = {**tower, "max_position_embeddings": LENGTH, "vocab_size": 49408, "eos_token_id": 49407}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "patch_size": 16}, projection_dim=128))
    encoder = PairEncoder(model.train(), ImageTransform(224))
    loss = LossConfig(pca_dim=16)
    backward(encoder, batch_of(4), loss)  # one-time setup in the first step is not compared
    model.zero_grad()
    batch = batch_of(batch_size)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, start = memory("VmRSS"), time.process_time()
    backward(encoder, batch, loss, chunk_size)
    seconds = time.process_time() - start
    held = memory("VmHWM") - before
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.save({"seconds": seconds, "megabytes": held, "gradient": gradient}, result)


def measured(batch_size: int, chunk_size: int | None, directory: str) -> dict[str, Any]:
    """Figures of a step in a process of its own."""
    result = Path(directory) / "result.pt"
    process = multiprocessing.get_context("spawn").Process(target=step, args=(batch_size, chunk_size, str(result)))
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"error: a step of {batch_size} pairs ended with {process.exitcode}")
    figures = torch.load(result, weights_only=True)
    name = "cached" if chunk_size else "plain"
    print(f"{name}, {batch_size} pairs: {figures['megabytes']:.0f} MiB, {figures['seconds']:.1f} s", flush=True)
    return figures


def main() -> None:
    """Measure, compare, report."""
    quick = arguments(__doc__).quick
    both, largest, chunk = (48, 96, 8) if quick else (512, 2048, 32)
    with TemporaryDirectory() as directory:
        plain, cached = measured(both, None, directory), measured(both, chunk, directory)
        large = measured(largest, chunk, directory)
    difference = float((plain["gradient"] - cached["gradient"]).norm() / plain["gradient"].norm())
    if difference > 1e-5:
        sys.exit(f"error: gradients differ by {difference:.1e}")
    report(
        "gradcache",
        quick,
        ratio=round(plain["megabytes"] / cached["megabytes"], 1),
        time_ratio=round(cached["seconds"] / plain["seconds"], 2),
        gradient_difference=float(f"{difference:.1e}"),
        batch=both,
        megabytes={"plain": round(plain["megabytes"]), "cached": round(cached["megabytes"])},
        largest={"batch": largest, "megabytes": round(large["megabytes"]), "seconds": round(large["seconds"], 1)},
    )


if __name__ == "__main__":
    main()
