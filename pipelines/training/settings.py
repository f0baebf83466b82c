"""Settings of `finetune.py`. Imports neither Ray nor torch: `--help` needs this module."""

import math
import os.path
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

import longclip.training
from longclip.constants import Scope, TowerName
from longclip.errors import ConfigError
from pipelines.common.columns import Columns
from pipelines.common.settings import Settings, merged, read_settings_file
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers

if TYPE_CHECKING:
    from longclip.training.loss import LossConfig

RECIPES = Path(longclip.training.__path__[0]) / "recipes"


DATA_CPUS = 3
"""Logical CPUs of the data pipeline on a local Ray. The third one runs tasks that only pass rows on: a machine with
two cores then reads 15 % more rows per second."""


class Data(Settings):
    """How the rows are read."""

    candidates: PositiveInt = 5
    """Maximum number of texts per cell, where a caption or summary is a list; one is sampled per epoch."""
    shuffle_window: PositiveInt = 1024
    """Rows of a stream that are read together and shuffled, in addition to the random order of the row groups."""
    streams: PositiveInt | None = None
    """Parts that the rows of an epoch are divided into; each worker reads whole ones. The rows of a step depend on this
    number and not on the number of workers, so a run can resume with any number of workers that divides it. null:
    workers.count, or the smallest number that every count from workers.min_count to workers.count divides."""


class Validation(Settings):
    """Retrieval in both directions at every checkpoint, over all workers."""

    input: str | None = None
    """Parquet with the columns of input; null: the split `val` of input, if it has one."""
    rows: int = Field(1000, ge=0)
    """Size of the fixed sample to measure on; 0 turns validation off."""


class Tower(Settings):
    """Size of one tower of an untrained model."""

    width: PositiveInt = 128
    """Hidden size."""
    layers: PositiveInt = 3
    """Transformer layers."""
    heads: PositiveInt = 4
    """Attention heads; must divide the width."""


class Architecture(Settings):
    """Size of an untrained CLIP."""

    text: Tower = Tower()
    vision: Tower = Tower()
    image_size: PositiveInt = 56
    """Side of the image in pixels."""
    patch_size: PositiveInt = 8
    """Side of a patch in pixels; must divide the image size."""
    embedding_dim: PositiveInt = 128
    """Dimensions of the shared space."""
    context_length: PositiveInt = 77
    """Text positions."""


class Model(Settings):
    """What the run starts from: a published CLIP (`base`) or an untrained one (`architecture`)."""

    base: str | None = None
    """Hugging Face CLIP: a directory, or a hub name such as openai/clip-vit-base-patch16."""
    architecture: Architecture | None = None
    """Start untrained, with these sizes."""
    positions: Literal["stretch", "interpolate", "keep"] = "stretch"
    """How text positions grow: knowledge-preserving stretch, plain interpolation to the same length, or not at all."""
    kept_positions: int = Field(20, ge=0)
    """First positions that the stretch keeps. They are frozen during training, also of a model that is stretched
    already."""
    stretch_factor: PositiveInt = 4
    """Factor by which the other positions are stretched: 20 + (77 - 20) * 4 = 248."""
    lock_image: bool = False
    """Freeze the image tower and train the text tower to match it (LiT)."""
    lock_image_unlocked_groups: int = Field(0, ge=0)
    """Number of groups of a locked image tower that are still trained, counted from its output: projection, last layer,
    ..."""
    lock_text: bool = False
    """Freeze the text tower, including its stretched positions."""
    lock_text_unlocked_groups: int = Field(0, ge=0)
    """Number of groups of a locked text tower that are still trained, counted from its output: projection, last layer,
    ..."""

    @property
    def locks(self) -> list[tuple[TowerName, bool, int]]:
        """For each tower: whether it is locked, and how many of its groups are still trained."""
        return [
            ("image", self.lock_image, self.lock_image_unlocked_groups),
            ("text", self.lock_text, self.lock_text_unlocked_groups),
        ]


class Loss(Settings):
    """The objective."""

    summary_loss_weight: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the summary (PCM) loss; 0 turns it off. Official code: 1.0."""
    pca_dim: PositiveInt = 32
    """Principal components of the image features that summaries are matched to."""
    pca_scope: Scope = "global"
    """Rows that the components are computed from: the global batch, or those of each worker (as the official code)."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of both losses."""
    allow_small_batch: bool = False
    """Accept batches of at most pca_dim + 1 rows. The components then reproduce all features: PCM has no effect."""

    def config(self) -> "LossConfig":
        """The same values as the library's class."""
        from longclip.training.loss import LossConfig  # imports torch, which --help does not need

        return LossConfig(**self.model_dump(exclude={"allow_small_batch"}))


class Optim(Settings):
    """Optimisation."""

    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW. Official recipe: 1e-6."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Decay of matrices; gains, biases and embeddings are not decayed."""
    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up; a cosine to zero follows."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    per_worker_batch_size: PositiveInt = 128
    """Pairs per worker and step. Negatives come from all workers: the global batch is this times the workers."""
    chunk_size: PositiveInt | None = None
    """Gradient caching: maximum number of pairs whose activations are held. Large batches then fit, at the cost of
    one more forward pass. null: all pairs."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: int = Field(20, ge=0)
    """Maximum number of steps that are skipped because their gradient is not finite; with more, the run stops."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; the average is validated and published."""
    logit_scale: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Initial temperature (exponentiated); null keeps that of the base. The official recipe restarts at 100."""


class TrainingWorkers(Workers):
    """Training processes. The cluster needs some more CPUs for the data pipeline."""

    count: PositiveInt = 2
    """Number of processes."""
    min_count: PositiveInt | None = None
    """Continue with as few workers as this when machines are lost, and with more when they come back. The global batch
    stays the same: each worker takes a larger share. null: wait for the lost machines."""
    max_failures: int = Field(3, ge=0)
    """Maximum number of worker restarts, each from the last checkpoint, after one was lost."""
    bf16: bool = False
    """Autocast to bfloat16; the losses and PCM stay in float32."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Every worker holds the whole model (ddp), or its part of weights, gradients and optimizer state (fsdp), for
    models that do not fit otherwise."""
    compile: bool = False
    """Compile the layers (torch.compile) at their first use: takes some minutes, makes steps on a GPU faster."""
    checkpoint_layers: bool = False
    """Activation checkpointing: recompute layers in the backward pass instead of keeping their activations. Saves
    memory for one more forward pass; if batches do not fit, optim.chunk_size saves more at the same cost."""


class Checkpoints(Settings):
    """Checkpoints of a run. They are written atomically, in the background."""

    every_steps: PositiveInt = 500
    """Steps between two checkpoints, and between two validations. A run resumes from its last checkpoint."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep: the last one and the best ones by `metric`; without validation the last ones."""
    metric: Literal["caption", "summary"] = "caption"
    """Texts that decide which checkpoint is best, by mean recall@1 of both directions on the validation rows."""
    publish: Literal["last", "best"] = "last"
    """Checkpoint that becomes the result of the run."""


class FinetuneSettings(Settings):
    """Everything that defines a run."""

    recipe: str = "tuned"
    """Values of `loss` and `optim` where you set none: `tuned` (better than the paper in later studies), `paper` (those
    of the official code), or a path to a YAML file. The named ones are in longclip/training/recipes/."""
    input: str
    """Parquet file, directory or URI with images, captions and (for the summary loss) summaries."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Share of rows that may be unreadable before the run stops."""
    data: Data = Data()
    columns: Columns = Columns()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    workers: TrainingWorkers = TrainingWorkers()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    output: str = "var/finetune"
    """Local directory that all workers see, for the model (`checkpoint/`), rejected rows and the state of the run."""
    log_every_steps: PositiveInt = 10
    """Steps between two reports of the losses."""
    storage: Storage = Storage()
    experiment: str = "longclip"
    """MLflow experiment."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of the initial weights and of the order of the data."""

    @classmethod
    def with_presets(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the recipe, overridden by the given ones.

        Raises:
            ConfigError: the recipe does not exist, or sets something other than `loss` and `optim`.
        """
        recipe = str(values.get("recipe", cls.model_fields["recipe"].default))
        named = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
        if recipe not in named and not recipe.lower().endswith((".yaml", ".yml")):
            known = ", ".join(named)
            raise ConfigError(
                f"recipe={recipe[:200]!r} is unknown; give one of {known}, or a path that ends in .yaml or .yml"
            )
        path = named.get(recipe) or Path(os.path.expanduser(recipe))
        preset = read_settings_file(cls, "recipe", path)
        if other := preset.keys() - {"loss", "optim"}:
            raise ConfigError(f"recipe '{path}' sets '{min(other)}'; a recipe sets only loss and optim")
        print(f"recipe: {path}", flush=True)
        return merged(preset, values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model.base is None) == (self.model.architecture is None):
            raise ValueError(
                "give exactly one of model.base (a CLIP to start from) and model.architecture (start untrained);"
                " e.g. --set model.base=openai/clip-vit-base-patch16"
            )
        small = self.pca_rows <= self.loss.pca_dim + 1
        if self.uses_summaries and small and not self.loss.allow_small_batch:
            raise ValueError(
                f"summary loss does nothing with loss.pca_dim={self.loss.pca_dim} on {self.pca_rows} rows: it needs"
                f" more than pca_dim + 1 = {self.loss.pca_dim + 1}; raise optim.per_worker_batch_size, lower"
                " loss.pca_dim, set loss.summary_loss_weight=0 or accept it with loss.allow_small_batch=true"
            )
        self._check_locks()
        self._check_workers()
        if self.model.architecture:
            self._check_architecture(self.model.architecture)
        return self

    def _check_architecture(self, architecture: Architecture) -> None:
        if architecture.image_size % architecture.patch_size:
            raise ValueError(
                f"model.architecture.patch_size={architecture.patch_size} does not divide"
                f" image_size={architecture.image_size}"
            )
        for name, tower in (("text", architecture.text), ("vision", architecture.vision)):
            if tower.width % tower.heads:
                raise ValueError(
                    f"model.architecture.{name}.heads={tower.heads} does not divide width={tower.width}; change one"
                )

    def _check_locks(self) -> None:
        locks = self.model.locks
        for tower, locked, unlocked in locks:
            if unlocked and not locked:
                raise ValueError(
                    f"model.lock_{tower}_unlocked_groups={unlocked} needs a locked tower, but the {tower} tower is not"
                    f" locked; add model.lock_{tower}=true"
                )
        if all(locked and not unlocked for _, locked, unlocked in locks):
            raise ValueError(
                "model.lock_image and model.lock_text leave nothing to train but the temperature; unlock a tower, or"
                " some groups, e.g. model.lock_image_unlocked_groups=1"
            )

    def _check_workers(self) -> None:
        least, most = self.workers.min_count or self.workers.count, self.workers.count
        if least > most:
            raise ValueError(f"workers.min_count={least} is more than workers.count={most}; lower it or set it to null")
        for count in range(least, most + 1):
            if self.streams % count:
                raise ValueError(
                    f"data.streams={self.streams} is not a multiple of {count} workers (workers.min_count to"
                    f" workers.count); set it to {math.lcm(*range(least, most + 1))}, for example, or to null"
                )
        if self.global_batch_size % self.streams:
            raise ValueError(
                f"the global batch of {self.global_batch_size} pairs (workers.count={most} x"
                f" optim.per_worker_batch_size={self.optim.per_worker_batch_size}) is not a multiple of"
                f" data.streams={self.streams}; change the batch size, or set data.streams to a number that divides it"
            )
        if self.workers.strategy == "fsdp" and self.optim.ema_decay:
            raise ValueError(
                "optim.ema_decay needs the whole model on every worker, but workers.strategy=fsdp shards it;"
                " remove one of them"
            )
        if self.checkpoints.metric == "summary" and not self.uses_summaries:
            raise ValueError(
                "checkpoints.metric=summary needs summaries, but loss.summary_loss_weight=0 turns them off; set"
                " checkpoints.metric=caption or a summary_loss_weight above 0"
            )

    @property
    def streams(self) -> int:
        """Parts that the rows of an epoch are divided into."""
        least, most = self.workers.min_count or self.workers.count, self.workers.count
        return self.data.streams or math.lcm(*range(least, most + 1))

    @property
    def uses_summaries(self) -> bool:
        """Whether the summary loss is part of the objective."""
        return self.loss.summary_loss_weight > 0

    @property
    def text_columns(self) -> list[str]:
        """Text columns that the run trains on, the caption first."""
        return [self.columns.caption] + ([self.columns.summary] if self.uses_summaries else [])

    @property
    def score(self) -> str:
        """Name of the metric that decides which checkpoint is best."""
        column = self.columns.caption if self.checkpoints.metric == "caption" else self.columns.summary
        return f"validation/{column}/mean_recall@1"

    def identity(self) -> dict[str, Any]:
        """Settings that the trained weights depend on: neither the number of workers nor how they divide a batch."""
        irrelevant = {"log_every_steps", "experiment", "storage", "output", "max_rejected_fraction"}
        values = self.model_dump(mode="json", exclude=irrelevant)
        values["data"]["streams"] = self.streams
        values["optim"] |= {
            "per_worker_batch_size": None,
            "chunk_size": None,
            "global_batch_size": self.global_batch_size,
        }
        values["workers"] = {"bf16": self.workers.bf16}
        if self.loss.pca_scope == "local" and self.uses_summaries:
            values["workers"]["count"] = self.workers.count
        return {key: value for key, value in values.items() if key not in ("validation", "checkpoints")}

    @property
    def global_batch_size(self) -> int:
        """Pairs per step over all workers."""
        return self.optim.per_worker_batch_size * self.workers.count

    @property
    def pca_rows(self) -> int:
        """Rows that the principal components are computed from."""
        return self.global_batch_size if self.loss.pca_scope == "global" else self.optim.per_worker_batch_size
