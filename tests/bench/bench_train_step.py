"""One training step on a CPU: `longclip.training.step.backward` against the official recipe's arithmetic.

Rivals have the same weights, batch and objective:

    official    both texts padded to 248, whole last layers, principal components by a differentiated SVD
    ours        length-sorted micro-batches, last layers where they are read, projector gradient
    cached      ours with gradient caching, a quarter of the batch at once (with --cached)

With --compile, the layers of ours and cached are compiled. First the losses must agree to 1e-6 and the gradients (of
all parameters together) to 1e-5, in float32, or it exits with code 1.

    python tests/bench/bench_train_step.py [--quick] [--model B/16] [--batch 32]

Needs torch, transformers, numpy, pillow and safetensors only. One thread, process CPU time. The last line is JSON;
`ratio` is official's time over ours, `flops_ratio` the same of counted operations, `token_efficiency` real over
computed tokens. For a GPU: `tests/gpu/check.sh`.
"""

import gc
import sys
import time
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import alternating, arguments, report
from longclip.tokenizer import concatenate
from longclip.training.compiling import compile_layers
from longclip.training.step import divide
from step_rivals import SHAPES, Rival, batch_of, build, fresh, rivals


def compare(contenders: dict[str, Rival]) -> None:
    """End the benchmark if the rivals do not compute the same."""
    results = {}
    for name, (model, step) in contenders.items():
        loss = fresh(step, model)
        results[name] = loss, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    exact_loss, exact = results["official"]
    norm = sum(gradient.square().sum() for gradient in exact.values()).sqrt()
    for name, (loss, gradients) in results.items():
        in_loss = float((loss - exact_loss).abs() / exact_loss)
        in_gradient = float(sum((gradients[key] - exact[key]).square().sum() for key in exact).sqrt() / norm)
        print(f"{name}: loss differs by {in_loss:.1e}, gradient by {in_gradient:.1e}", flush=True)
        if in_loss > 1e-6 or in_gradient > 1e-5:
            sys.exit(f"error: {name} computes something else")


def main() -> None:
    """Compare, measure, report."""
    options = arguments(
        __doc__,
        model={"choices": list(SHAPES), "default": "B/32"},
        batch={"type": int, "default": None, "help": "pairs (default: 32; 6 with --quick)"},
        cached={"action": "store_true", "help": "with gradient caching as well"},
        compile={"action": "store_true", "help": "compile the layers of ours"},
    )
    torch.set_num_threads(1)
    batch = batch_of(options.batch or (6 if options.quick else 32), SHAPES[options.model].image_size)
    model = build(options.model, 3 if options.quick else None)
    contenders = rivals(model, batch, max(1, len(batch) // 4) if options.cached else None)
    flops = {}
    for name, (model, step) in contenders.items():
        with FlopCounterMode(display=False) as counter:
            fresh(step, model)
        flops[name] = counter.get_total_flops()
    if options.compile:  # the counter sees no operations in compiled layers
        compile_layers(contenders["ours"].model)
    compare(contenders)
    gc.collect()
    runs = {name: partial(fresh, step, model) for name, (model, step) in contenders.items()}
    seconds = alternating(runs, 3 if options.quick else 5, time.process_time)
    assert batch.summary is not None
    both = concatenate([batch.caption, batch.summary])
    (part,) = divide(batch.pixels, both, len(batch))
    computed = sum(len(rows) * int(both.lengths[rows].max()) for rows in part.micro_batches)
    report(
        "train_step",
        options.quick,
        model=options.model,
        batch=len(batch),
        compiled=options.compile,
        device="cpu, one thread",
        ratio=round(seconds["official"] / seconds["ours"], 2),
        flops_ratio=round(flops["official"] / flops["ours"], 2),
        token_efficiency=round(int(both.lengths.sum()) / computed, 3),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        pairs_per_second={name: round(len(batch) / value, 2) for name, value in seconds.items()},
    )


if __name__ == "__main__":
    main()
