"""The loop that every training worker runs."""

import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from longclip.checkpoint import save_checkpoint
from longclip.compiling import compile_layers
from longclip.distributed import sum_over_workers, world_size
from longclip.errors import DataError, TrainingError
from longclip.task import (
    ImageTextBatch,
    PairEncoder,
    backward,
    clamp_logit_scale,
    learning_rate_factor,
    parameter_groups,
)
from longclip.tokenizer import TokenBatch
from pipelines.finetune_settings import FinetuneSettings, initial_checkpoint

MIXER = 0x9E3779B97F4A7C1 | 1
"""Odd multiplier that spreads the low bits of a number over the high ones."""

MODEL_DIR, STATE_FILE = "checkpoint", "training_state.pt"


def train_loop(config: dict[str, Any]) -> None:
    """Train on this worker's shard.

    Args:
        config: `settings` (of `FinetuneSettings`, as JSON values) and `total_steps`.
    """
    settings = FinetuneSettings.model_validate(config["settings"])
    total_steps: int = config["total_steps"]
    run = TrainingRun(settings, total_steps)
    run.resume()
    while run.step < total_steps:
        before = run.step
        for batch in run.speed.waiting(_batches(settings, seed=settings.seed + run.step)):
            run.train_step(batch)
            done = run.step >= total_steps
            save = done or run.step % settings.checkpoint_every_steps == 0
            if save or run.step % settings.log_every_steps == 0:
                run.report(save)
            if done:
                break
        if run.step == before:
            raise DataError(f"data.train='{settings.data.train}': too few readable rows are left for one global batch")


def _batches(settings: FinetuneSettings, seed: int) -> Iterator[ImageTextBatch]:
    """One pass over this worker's shard. All workers see equally many batches: the shards are equal, tails are left."""
    shard = ray.train.get_dataset_shard("train")
    batches = shard.iter_torch_batches(
        batch_size=settings.optim.per_worker_batch_size,
        drop_last=True,
        prefetch_batches=2,
        device="cpu",
        local_shuffle_buffer_size=settings.data.shuffle_buffer,
        local_shuffle_seed=seed,
    )
    for columns in batches:
        caption = draw_texts(columns, settings.columns.caption, seed)
        summary = draw_texts(columns, settings.columns.summary, seed) if settings.uses_summaries else None
        yield ImageTextBatch(columns["pixels"], caption, summary)


def draw_texts(columns: dict[str, Tensor], name: str, seed: int) -> TokenBatch:
    """One of the candidate texts of each row, by the row's id and the seed: the same on any number of workers."""
    salted = (columns["row_key"] ^ zlib.crc32(f"{name}{seed}".encode())) * MIXER
    place = (salted >> 32) % columns[f"{name}_count"]
    rows = torch.arange(len(place))
    ids, lengths, full = (columns[f"{name}_{part}"][rows, place].long() for part in ("ids", "lengths", "full_lengths"))
    return TokenBatch(ids, lengths, full)


class Speed:
    """What a worker has done since its last report."""

    def __init__(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        """Forget what was counted."""
        self.pairs, self.tokens, self.waited, self.since = 0, 0, 0.0, time.monotonic()

    def waiting(self, batches: Iterator[ImageTextBatch]) -> Iterator[ImageTextBatch]:
        """The batches; the time until each of them comes is counted."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def count(self, batch: ImageTextBatch) -> None:
        """Count a batch that was trained on."""
        self.pairs += len(batch)
        self.tokens += sum(int(tokens.lengths.sum()) for tokens in (batch.caption, batch.summary) if tokens is not None)

    def metrics(self, workers: int, batch_size: int) -> dict[str, float]:
        """Pairs and tokens a second of all workers, if all are as fast as this one; the share of time without data."""
        seconds = time.monotonic() - self.since
        return {
            "batch_seconds": seconds * batch_size / max(1, self.pairs),
            "pairs_per_second": self.pairs * workers / seconds,
            "tokens_per_second": self.tokens * workers / seconds,
            "data_wait_share": self.waited / seconds,
        }


class TrainingRun:
    """Model, optimizer and schedule of one worker, and the step they have reached."""

    def __init__(self, settings: FinetuneSettings, total_steps: int) -> None:
        self.settings, self.total_steps = settings, total_steps
        self.checkpoint = initial_checkpoint(settings)
        self.loss = settings.loss.config()
        if settings.workers.compile:
            compile_layers(self.checkpoint.model)
        # CLIP's only buffers are position numbers: there is nothing to keep alike between workers.
        self.encoder = ray.train.torch.prepare_model(
            PairEncoder(self.checkpoint.model, self.checkpoint.transform, settings.workers.checkpoint_layers).train(),
            parallel_strategy_kwargs={"broadcast_buffers": False},
        )
        self.device = ray.train.torch.get_device()
        optim = settings.optim
        groups = parameter_groups(self.checkpoint.model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, fused=True)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, optim.warmup_steps, total_steps)
        )
        self.step = 0
        self.skipped_steps = 0
        self.losses: dict[str, Tensor] = {}
        self.gradient_norm = torch.tensor(0.0)
        self.speed = Speed()

    def train_step(self, batch: ImageTextBatch) -> None:
        """One update of the parameters; none if the gradient is not finite, the same decision on all workers."""
        optim = self.settings.optim
        self.optimizer.zero_grad(set_to_none=True)
        self.losses = backward(self.encoder, batch, self.loss, optim.chunk_size, self.settings.workers.bf16)
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), optim.max_grad_norm)
        if self.gradient_norm.isfinite():
            self.optimizer.step()
            clamp_logit_scale(self.checkpoint.model)
        else:
            self._skip()
        self.schedule.step()
        self.step += 1
        self.speed.count(batch)

    def _skip(self) -> None:
        self.skipped_steps += 1
        if self.skipped_steps > self.settings.optim.max_skipped_steps:
            raise TrainingError(
                f"the gradient was not finite in {self.skipped_steps} of {self.step + 1} steps, more than"
                f" optim.max_skipped_steps={self.settings.optim.max_skipped_steps}; lower optim.learning_rate"
                f" ({self.settings.optim.learning_rate}), lengthen optim.warmup_steps or set workers.bf16=false"
            )

    def report(self, save: bool) -> None:
        """Report averaged losses and speed to Ray Train, with a checkpoint if `save`. All workers call it alike."""
        metrics: dict[str, float] = {
            name: (sum_over_workers(loss) / world_size()).item() for name, loss in self.losses.items()
        }
        metrics |= {
            "step": self.step,
            "total_steps": self.total_steps,
            "learning_rate": float(self.schedule.get_last_lr()[0]),
            "logit_scale": float(self.checkpoint.model.logit_scale.detach().exp()),
            "gradient_norm": float(self.gradient_norm),
            "skipped_steps": self.skipped_steps,
            **self.speed.metrics(world_size(), self.settings.optim.per_worker_batch_size),
        }
        if save and ray.train.get_context().get_world_rank() == 0:
            with tempfile.TemporaryDirectory() as directory:
                self._save(Path(directory))
                checkpoint = ray.train.Checkpoint.from_directory(directory)
                ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step_{self.step:07d}")
        else:
            ray.train.report(metrics, checkpoint_dir_name=f"step_{self.step:07d}" if save else None)
        self.speed.start_again()

    def resume(self) -> None:
        """Go on from the last checkpoint of a broken run with the same settings, if there is one."""
        last = ray.train.get_checkpoint()
        if last is None:
            return
        with last.as_directory() as directory:
            state = torch.load(Path(directory) / STATE_FILE, weights_only=True, map_location=self.device)
        self.checkpoint.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]

    def _save(self, directory: Path) -> None:
        metadata = {"settings": self.settings.model_dump(mode="json"), "step": self.step}
        save_checkpoint(self.checkpoint, directory / MODEL_DIR, metadata)
        state = {
            "model": self.checkpoint.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "skipped_steps": self.skipped_steps,
        }
        torch.save(state, directory / STATE_FILE)
