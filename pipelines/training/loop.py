"""The loop that every training worker runs."""

import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPModel
from transformers.utils.logging import disable_progress_bar

from longclip.errors import TrainingError
from longclip.lineage import Lineage
from longclip.tokenizer import TokenBatch
from longclip.training.compiling import compile_layers
from longclip.training.distributed import rank, sum_over_workers, world_size
from longclip.training.fsdp import clip_gradients, shard, whole_outside_layers
from longclip.training.step import (
    ImageTextBatch,
    PairEncoder,
    backward,
    clamp_logit_scale,
    learning_rate_factor,
    parameter_groups,
)
from pipelines.common.model_inputs import chosen_texts
from pipelines.training.checkpoints import on_cpu, read_state, write_state
from pipelines.training.initial_model import initial_checkpoint
from pipelines.training.row_source import Source
from pipelines.training.settings import FinetuneSettings
from pipelines.training.throughput import Throughput
from pipelines.training.validation import validate

MIXER = 0x9E3779B97F4A7C1 | 1
"""Odd multiplier that spreads the low bits of a number over the high ones."""

VALIDATION_BATCH = 64


def train_loop(config: dict[str, Any]) -> None:
    """Train on this worker's part of each global batch.

    Args:
        config: `settings` (of `FinetuneSettings`, as JSON values), the `Lineage` of the checkpoints, `run_directory`,
            the `Source` to `train` on, that of `validation` or None, and a handle of the `quarantine`.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray logs each report on every worker
    disable_progress_bar()
    run = TrainingRun(FinetuneSettings.model_validate(config["settings"]), config)
    run.resume()
    for batch in run.throughput.timed(run.batches()):
        run.train_step(batch)
        save = run.step == run.total_steps or run.step % run.settings.checkpoints.every_steps == 0
        if save or run.step % run.settings.log_every_steps == 0:
            run.report(save)


def draw_texts(columns: dict[str, Tensor], name: str, seed: int) -> TokenBatch:
    """One of the candidate texts of each row, chosen by its id and the seed: the same for any number of workers."""
    salted = (columns["row_key"] ^ zlib.crc32(f"{name}{seed}".encode())) * MIXER
    return chosen_texts(columns, name, (salted >> 32) % columns[f"{name}_count"])


class TrainingRun:
    """Model, optimizer and schedule of one worker, and the step they have reached."""

    def __init__(self, settings: FinetuneSettings, config: dict[str, Any]) -> None:
        self.settings, self.directory = settings, Path(config["run_directory"])
        self.lineage: Lineage = config["lineage"]
        self.train: Source = config["train"]
        self.validation: Source | None = config["validation"]
        self.quarantine, self.total_steps = config["quarantine"], self.train.rows.steps
        self.texts = settings.text_columns
        self.batch_size = settings.global_batch_size // world_size()
        self.checkpoint = initial_checkpoint(settings)
        self.loss = settings.loss.config()
        if settings.workers.compile:
            compile_layers(self.checkpoint.model)
        self.encoder = self._parallel()
        optim = settings.optim
        self.average = (
            AveragedModel(self.checkpoint.model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))
            if optim.ema_decay
            else None
        )
        groups = parameter_groups(self.checkpoint.model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, fused=True)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, optim.warmup_steps, self.total_steps)
        )
        self.step = 0
        self.skipped_steps = 0
        self.losses: dict[str, Tensor] = {}
        self.gradient_norm = torch.tensor(0.0)
        self.throughput = Throughput()

    def _parallel(self) -> PairEncoder | DistributedDataParallel:
        """Both towers on this worker's device, as one module synchronised with the other workers."""
        workers = self.settings.workers
        encoder = PairEncoder(self.checkpoint.model, self.checkpoint.transform, workers.checkpoint_layers).train()
        if workers.strategy == "fsdp":
            encoder = ray.train.torch.prepare_model(encoder, parallel_strategy=None)
            shard(encoder)
            return encoder
        # CLIP's only buffers are position numbers: there is nothing to synchronise between workers.
        return ray.train.torch.prepare_model(encoder, parallel_strategy_kwargs={"broadcast_buffers": False})

    def batches(self) -> Iterator[ImageTextBatch]:
        """This worker's part of every remaining global batch."""
        steps = range(self.step, self.total_steps)
        for step, columns in zip(
            steps, self.train.batches(steps, self.batch_size, self.settings.workers.cpus), strict=True
        ):
            seed = self.settings.seed + step // self.train.rows.order.steps_per_epoch
            texts = [draw_texts(columns, name, seed) for name in self.texts]
            yield ImageTextBatch(columns["pixels"], texts[0], texts[1] if len(texts) > 1 else None)

    def train_step(self, batch: ImageTextBatch) -> None:
        """Update the parameters, or skip the step if the gradient is not finite; all workers decide alike."""
        optim = self.settings.optim
        # Random numbers of the model (dropout) depend on the step and the worker: a resumed run draws the same.
        torch.manual_seed(hash((self.settings.seed, self.step, rank())))
        self.optimizer.zero_grad(set_to_none=True)
        self.losses = backward(self.encoder, batch, self.loss, optim.chunk_size, self.settings.workers.bf16)
        self.gradient_norm = clip_gradients(self.encoder, optim.max_grad_norm)
        if self.gradient_norm.isfinite():
            self.optimizer.step()
            clamp_logit_scale(self.checkpoint.model)
            if self.average is not None:
                self.average.update_parameters(self.checkpoint.model)
        else:
            self._skip()
        self.schedule.step()
        self.step += 1
        self.throughput.count(batch)

    def _skip(self) -> None:
        self.skipped_steps += 1
        if self.skipped_steps > self.settings.optim.max_skipped_steps:
            raise TrainingError(
                f"the gradient was not finite in {self.skipped_steps} of {self.step + 1} steps, more than"
                f" optim.max_skipped_steps={self.settings.optim.max_skipped_steps}; lower optim.learning_rate"
                f" ({self.settings.optim.learning_rate}), lengthen optim.warmup_steps or set workers.bf16=false"
            )

    def report(self, save: bool) -> None:
        """Report averaged losses and speed to Ray Train, with validation and a checkpoint if `save`.

        All workers must call it at the same step. The checkpoint is a copy, written while training continues.
        """
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
            **self.throughput.metrics(world_size(), self.batch_size),
        }
        if save:
            metrics |= self._validate()
        name = f"step_{self.step:07d}" if save else None
        write = self._writer() if save else None
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(str(self.directory / name)) if name and write else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=write,
        )
        self.throughput.reset()

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        steps = range(self.validation.rows.steps)
        batches = self.validation.batches(steps, VALIDATION_BATCH, self.settings.workers.cpus)
        model = self.checkpoint.model if self.average is None else cast(CLIPModel, self.average.module)
        with whole_outside_layers(self.encoder):
            return validate(model, self.checkpoint.transform, batches, self.texts)

    def _writer(self) -> Callable[[ray.train.Checkpoint, str], ray.train.Checkpoint] | None:
        """Function that writes a checkpoint of this step, even if it is called later; None on all workers but the
        first, which collects the parts of the others."""
        sharded = self.settings.workers.strategy == "fsdp"  # the whole state may not fit on the device
        options = StateDictOptions(full_state_dict=True, cpu_offload=sharded)
        weights, optimizer = get_state_dict(self.checkpoint.model, self.optimizer, options=options)
        if rank() > 0:
            return None
        state = on_cpu(
            {
                "model": weights,
                "average": self.average.state_dict() if self.average is not None else None,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "rejected": ray.get(self.quarantine.reasons.remote()),
            }
        )
        published = state["model"]
        if self.average is not None:
            average = state["average"].items()
            published = {name.removeprefix("module."): value for name, value in average if name != "n_averaged"}
        metadata = {"settings": self.settings.model_dump(mode="json"), "step": self.step, **self.lineage.metadata()}

        def write(checkpoint: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
            write_state(Path(checkpoint.path), self.checkpoint, published, state, metadata)
            return checkpoint

        return write

    def resume(self) -> None:
        """Resume from the last checkpoint of an interrupted run with the same settings, if there is one."""
        last = ray.train.get_checkpoint()
        if last is None:
            return
        state = read_state(Path(last.path))
        set_state_dict(
            self.checkpoint.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        if rank() == 0:
            ray.get(self.quarantine.add.remote(state["rejected"]))
