"""What Ray costs a training loop: the same steps of a small CLIP, on the same batches, alone and under Ray Train.

Rivals, each in a process of its own with one thread:

    bare    a plain loop over batches in memory
    train   the same loop in a worker of Ray Train, which reports every ten steps, as finetune does
    fed     that, with batches that come from Ray Data, whose rows are in the cluster's memory

What starts up costs the same for any number of steps, so the time of a step is the slope between two numbers of them.
All rivals must end with the same parameters, else exit code 1.

    python tests/bench/bench_goodput.py [--quick]

The last line is JSON; `ratio` is bare's time of a step over fed's (the goodput), `ratio_train` over train's, by wall
clock: one core for the loop, the others for Ray, and nothing else should run. `busy_ratio` and `busy_ratio_train` are
the same of the processor time of the loop's own thread, which tells on a busy machine what Ray adds to the loop, but
not how long it waits.
"""

import hashlib
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import torch
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from harness import arguments, report
from longclip.images import ImageTransform
from longclip.tokenizer import TokenBatch
from longclip.training.loss import LossConfig
from longclip.training.step import ImageTextBatch, PairEncoder, backward, clamp_logit_scale, parameter_groups
from pipelines.common.cluster import connect
from pipelines.training.settings import DATA_CPUS
from step_rivals import LENGTH, texts

SIDE, BATCH, DISTINCT, REPORT_EVERY = 56, 16, 8, 10
CLOCKS = ("seconds", "busy")
Columns = dict[str, Any]
Figures = dict[str, Any]


def columns_of_batch(number: int) -> Columns:
    """One of some batches, as arrays; captions have about 100 tokens, summaries 12."""
    draw = torch.Generator().manual_seed(number % DISTINCT)
    columns: Columns = {
        "pixels": torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=draw).numpy()
    }
    for name, least, most in (("caption", 40, 160), ("summary", 4, 20)):
        tokens = texts(draw, torch.randint(least, most + 1, (BATCH,), generator=draw))
        columns[name] = np.zeros((BATCH, most), np.int32)
        columns[name][:, : tokens.input_ids.shape[1]] = tokens.input_ids.numpy()
        columns[f"{name}_lengths"] = tokens.lengths.numpy()
    return columns


def batch_of(columns: dict[str, Tensor]) -> ImageTextBatch:
    """A batch as the step takes it."""
    caption, summary = (
        TokenBatch(columns[name].long(), columns[f"{name}_lengths"], columns[f"{name}_lengths"])
        for name in ("caption", "summary")
    )
    return ImageTextBatch(columns["pixels"], caption, summary)


def in_memory(steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of this process."""
    batches = [{name: torch.from_numpy(array) for name, array in columns_of_batch(n).items()} for n in range(DISTINCT)]
    for step in range(steps):
        yield batches[step % DISTINCT]


def from_ray_data(steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches whose rows Ray Data hands out, in their order, as to the workers of finetune."""
    batches = ray.put([columns_of_batch(number) for number in range(DISTINCT)])

    def rows(batch: dict[str, np.ndarray]) -> Iterator[Columns]:
        for step in batch["item"].tolist():
            yield ray.get(batches)[step % DISTINCT]

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    numbers = ray.data.from_items(list(range(steps)), override_num_blocks=max(1, steps // 16))
    yield from numbers.map_batches(rows, batch_size=16).iter_torch_batches(
        batch_size=BATCH, prefetch_batches=2, device="cpu"
    )


def loop(batches: Iterator[dict[str, Tensor]], told: Callable[[Figures], None]) -> Figures:
    """Train on the batches: seconds, steps, and a digest of the parameters."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**tower, "max_position_embeddings": LENGTH, "vocab_size": 49408, "eos_token_id": 49407}
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).train()
    encoder = PairEncoder(model, ImageTransform(SIDE))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True)
    loss = LossConfig(pca_dim=8)
    start, busy, step = time.perf_counter(), time.thread_time(), 0
    for columns in batches:
        step += 1
        optimizer.zero_grad()
        losses = backward(encoder, batch_of(columns), loss)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        clamp_logit_scale(model)
        if step % REPORT_EVERY == 0:
            told({name: loss.item() for name, loss in losses.items()})
    seconds, busy = time.perf_counter() - start, time.thread_time() - busy
    parameters = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return {"seconds": seconds, "busy": busy, "steps": step, "digest": hashlib.sha256(parameters).hexdigest()}


def both(config: dict[str, Any], batches: Callable[[int], Iterator[dict[str, Tensor]]], told: Any) -> None:
    """The loop over both numbers of steps, in this process; figures go to a file."""
    torch.set_num_threads(1)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    found = [loop(batches(steps), told) for steps in (2, *config["steps"])]  # the first pays for what a process sets up
    torch.save(found[1:], config["result"])


def to_ray_train(figures: Figures) -> None:
    """Not in Ray's default way, which waits until the controller took the report before: it does so every 2 s."""
    ray.train.report(figures, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)


def silent(_: Figures) -> None:
    """The bare loop reports to nobody."""


def bare(config: dict[str, Any]) -> None:
    """In a fresh process."""
    process = multiprocessing.get_context("spawn").Process(target=both, args=(config, in_memory, silent))
    process.start()
    process.join()


def under_ray_train(batches: Callable[[int], Iterator[dict[str, Tensor]]], config: dict[str, Any]) -> None:
    """In a worker of Ray Train."""
    directory = str(Path(config["result"]).parent)
    TorchTrainer(
        partial(both, batches=batches, told=to_ray_train),
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=directory, logging_config=LoggingConfig(log_level="ERROR")),
    ).fit()


RIVALS: dict[str, Callable[[dict[str, Any]], None]] = {
    "bare": bare,
    "train": partial(under_ray_train, in_memory),
    "fed": partial(under_ray_train, from_ray_data),
}


def main() -> None:
    """Measure, compare, report."""
    quick = arguments(__doc__).quick
    steps, rounds = ((10, 30), 1) if quick else ((20, 120), 5)
    connect(1 + DATA_CPUS)
    slopes: dict[tuple[str, str], list[float]] = {(clock, name): [] for clock in CLOCKS for name in RIVALS}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            expected = None
            for name, run in RIVALS.items():
                result = f"{directory}/{name}-{number}.pt"
                run({"steps": steps, "result": result})
                short, long = torch.load(result, weights_only=True)
                if (short["steps"], long["steps"]) != steps:
                    sys.exit(f"error: {name} trained {short['steps']} and {long['steps']} steps, not {steps}")
                expected = expected or long["digest"]
                if long["digest"] != expected:
                    sys.exit(f"error: {name} ends with other parameters than bare")
                for clock in CLOCKS:
                    slopes[clock, name].append((long[clock] - short[clock]) / (steps[1] - steps[0]))
                last = 1000 * slopes["seconds", name][-1]
                print(f"round {number + 1}/{rounds}: {name} {last:.1f} ms a step", flush=True)
    ray.shutdown()
    seconds, busy = ({name: statistics.median(slopes[clock, name]) for name in RIVALS} for clock in CLOCKS)
    report(
        "goodput",
        quick,
        ratio=round(seconds["bare"] / seconds["fed"], 3),
        ratio_train=round(seconds["bare"] / seconds["train"], 3),
        busy_ratio=round(busy["bare"] / busy["fed"], 3),
        busy_ratio_train=round(busy["bare"] / busy["train"], 3),
        milliseconds_a_step={name: round(1000 * value, 1) for name, value in seconds.items()},
        steps=list(steps),
        batch=BATCH,
        cores=os.cpu_count(),
    )


if __name__ == "__main__":
    main()
