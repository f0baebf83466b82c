"""Time, memory and share of the bf16 peak of a training step with its update, each rival at a batch that fits it."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from longclip.training.compiling import compile_layers
from longclip.training.loss import LossConfig
from longclip.training.pcm import primary_components
from step_rivals import SHAPES, LongClipStep, OfficialStep, batch_of, build, fresh

PEAK_FLOPS = 989e12
"""Dense bf16 peak of an H100 or H200 SXM (NVIDIA's data sheets, 2023)."""

ROUNDS = 5
LARGEST_BATCH = 1024
FILL = 0.85
"""Share of the free memory that a batch may take."""

Step = Callable[[], Tensor]


@dataclass
class Budget:
    """When to stop, and what was not measured because of it."""

    until: float
    left_out: list[str] = field(default_factory=list)

    def allows(self, what: str) -> bool:
        """Whether there is time for another measurement; notes what is left out otherwise."""
        if time.monotonic() < self.until:
            return True
        self.left_out.append(f"{what}: out of time")
        return False


def step_times(name: str, device: str, budget: Budget) -> Iterator[dict[str, Any]]:
    """A row for each rival: the official arithmetic; ours; compiled; compiled with gradient caching."""
    shape = SHAPES[name]
    if not budget.allows(name):
        return
    # Initial values are drawn on the CPU, once for all rivals: speed does not depend on them.
    model = build(name).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    bf16 = device == "cuda"

    def rival(kind: type[OfficialStep] | type[LongClipStep], batch_size: int) -> Any:
        loss = LossConfig(summary_loss_weight=1.0, pca_dim=min(32, batch_size // 3))
        return kind(model, batch_of(batch_size, shape.image_size), loss, bf16)

    flops_per_pair = _flops(model, rival(LongClipStep, 16)) / 16
    rows: list[tuple[str, Callable[[int], Step]]] = [
        ("official", partial(rival, OfficialStep)),
        ("ours", partial(rival, LongClipStep)),
        ("ours, compiled", partial(rival, LongClipStep)),
    ]
    fits = 16
    for title, make in rows:
        if not budget.allows(f"{name}, {title}"):
            continue
        if title.endswith("compiled"):
            compile_layers(model, "inductor" if device == "cuda" else "aot_eager")
        fits = _batch_that_fits(make, model, optimizer) if device == "cuda" else 16
        yield _measured(name, title, fits, make(fits), model, optimizer, flops_per_pair)
    title = "ours, compiled, cached"
    if budget.allows(f"{name}, {title}"):
        large = LARGEST_BATCH if device == "cuda" else 32
        step = rival(LongClipStep, large)
        yield _measured(name, title, large, partial(step, fits // 2), model, optimizer, flops_per_pair)


def pcm_times(device: str, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Milliseconds of PCM with its gradient, and of `eigh` alone, in float32."""
    rows = []
    for count, width in sizes:
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(count, width, generator=draw).to(device)
        covariance = (features.T @ features / count).contiguous()
        eigh = _seconds(partial(torch.linalg.eigh, covariance), device)
        pcm = _seconds(partial(_pcm, features.requires_grad_()), device)
        rows.append({"rows": count, "columns": width, "eigh_ms": round(eigh * 1e3, 2), "pcm_ms": round(pcm * 1e3, 2)})
    return rows


def _pcm(features: Tensor) -> None:
    primary_components(features, 16).square().sum().backward()


def _flops(model: CLIPModel, step: Step) -> int:
    """Useful operations of a step: no padding to 248, nothing computed twice."""
    with FlopCounterMode(display=False) as counter:
        fresh(step, model)
    return counter.get_total_flops()


def _update(step: Step, model: CLIPModel, optimizer: torch.optim.Optimizer) -> None:
    fresh(step, model)
    optimizer.step()


def _batch_that_fits(make: Callable[[int], Step], model: CLIPModel, optimizer: torch.optim.Optimizer) -> int:
    """Largest power of two whose step fits the free memory, by the memory that two small batches take."""
    peaks = []
    for size in (32, 64):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _update(make(size), model, optimizer)
        peaks.append(torch.cuda.max_memory_allocated())
    per_pair = max(1, (peaks[1] - peaks[0]) / 32)
    fixed = peaks[0] - 32 * per_pair
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    most = (FILL * free - fixed) / per_pair
    return 2 ** min(LARGEST_BATCH.bit_length() - 1, int(most).bit_length() - 1)


def _measured(
    name: str,
    title: str,
    batch_size: int,
    step: Step,
    model: CLIPModel,
    optimizer: torch.optim.Optimizer,
    flops_per_pair: float,
) -> dict[str, Any]:
    device = model.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(lambda: _update(step, model, optimizer), device)
    on_gpu = device == "cuda"
    return {
        "model": name,
        "step": title,
        "batch": batch_size,
        "seconds": round(seconds, 4),
        "pairs_per_second": round(batch_size / seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
        "share_of_peak": round(flops_per_pair * batch_size / seconds / PEAK_FLOPS, 4) if on_gpu else None,
    }


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median of some rounds after two to warm up, wall clock, the device waited for."""
    times = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
