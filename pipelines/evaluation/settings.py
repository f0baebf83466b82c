"""Settings of `benchmark.py` and `promote.py`. Imports neither Ray nor torch: `--help` needs this module."""

import re
from collections.abc import Iterable
from itertools import product
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from longclip.constants import Activation
from pipelines.common.settings import Settings
from pipelines.common.storage import Storage
from pipelines.common.workers import Workers
from pipelines.data.sources.settings import SourceSettings
from pipelines.evaluation.paper_figures import paper_figures


def check_file_names(names: Iterable[str]) -> None:
    """Check names that become parts of file names.

    Raises:
        ValueError: a name cannot be used.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_@-][A-Za-z0-9._@-]*", name):
            raise ValueError(
                f"the name '{name}' cannot be a file name; use only letters A-Z, a-z, digits and . _ - @, and no dot at"
                " the start"
            )


class TaskSettings(Settings):
    """A task: `--set tasks.urban1k.input=/data/Urban1k`."""

    input: str
    """Directory, annotation file or Parquet of the data."""
    protocol: str | None = None
    """Name in protocols.yaml; null for the name of the task if it is a protocol, or else no protocol."""
    kind: Literal["retrieval", "zero_shot"] = "retrieval"
    """Kind of task, without a protocol."""
    text: Literal["long", "short"] = "long"
    """Kind of the captions, without a protocol."""
    templates: str = "simple"
    """Prompt templates, without a protocol: `simple` or `openai`."""
    classes: str | None = None
    """File of class names, one per line in the order of their numbers, without a protocol; null for the labels."""
    source: SourceSettings = SourceSettings()
    """How the data is read; a protocol sets `format` and `split`."""
    subset: bool = False
    """Accept other counts than those of the protocol. The result is then marked as NOT the protocol's."""


class MeasureSettings(Settings):
    """Settings of every job that measures models."""

    tasks: dict[str, TaskSettings] = Field(min_length=1)
    """Tasks by name. Each has `input`, and may have protocol, kind (retrieval, zero_shot), text (long,
    short), classes, templates (simple, openai), source (as for prepare) and subset."""
    storage: Storage = Storage()
    workers: Workers = Workers()
    max_rejected_fraction: float = Field(default=0.0, ge=0, le=1)
    """Maximum share of unusable rows. 0 by default, as fewer candidates would improve the figures."""
    cache: str = "~/.cache/longclip/models"
    """Directory for downloaded and converted models; on a cluster, one that all nodes share."""

    @field_validator("tasks", "models", check_fields=False)
    @classmethod
    def _are_file_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        check_file_names(named)
        return named


class BenchmarkSettings(MeasureSettings):
    """Settings of a benchmark."""

    models: dict[str, str] = Field(min_length=1)
    """Models by their name in the report."""
    activations: dict[str, Activation] = Field(default={})
    """Activation (quick_gelu, gelu) of models given as weights files, by their name. Without it, and without a config
    next to the weights, quick_gelu is assumed with a warning."""
    base: str | None = None
    """Model that the others are compared with, query by query; null for the first one."""
    paper_figures: dict[str, str] = Field(default={})
    """Models to compare with a paper's figures, by their name in paper_figures.yaml: `{official: long-clip-b16}`."""
    long_text: bool = True
    """On long texts, also measure recall by length, with perturbed texts, and against hard negatives, and whether
    similarity grows with the text."""
    perturbation_draws: PositiveInt = 5
    """How many times each random perturbation of long texts is drawn. Each draw encodes all texts again."""
    equal_margin: float = Field(default=0.02, gt=0, lt=1)
    """Loss of recall at 1, as a share, with which a cut text counts as equal to the whole one in the effective length:
    0.02 is two points. The interval of the loss must be smaller."""
    output: str = "var/benchmark"
    """Local directory of the results. Measurements of an earlier or killed run in it are used again where the model,
    the data and the settings of the task are the same."""

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for field, names, known in (
            ("base", [self.base] if self.base else [], self.models),
            ("activations", list(self.activations), self.models),
            ("paper_figures", list(self.paper_figures), self.models),
            ("paper_figures", list(self.paper_figures.values()), paper_figures()),
        ):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"{field} has '{wrong[0]}', which is unknown; known are {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _files_differ(self) -> Self:
        if "results" in self.tasks:
            raise ValueError("tasks has 'results', whose file would be that of all results; give it another name")
        pairs: dict[str, tuple[str, str]] = {}
        for task, model in product(self.tasks, self.models):
            other = pairs.setdefault(f"{task}.{model}", (task, model))
            if other != (task, model):
                raise ValueError(
                    f"task '{task}' with model '{model}', and task '{other[0]}' with model '{other[1]}', would be"
                    f" written to the same file {task}.{model}.parquet; rename one of them"
                )
        return self


class PromoteSettings(MeasureSettings):
    """Settings of a promotion."""

    name: str = "longclip"
    """Registered model."""
    candidate: str = "candidate"
    """Alias of the version that may become champion."""
    champion: str = "champion"
    """Alias of the version in use, which is moved."""
    margin: float = Field(default=0.01, ge=0, lt=1)
    """Maximum loss of hits at 1 on short text and zero-shot, as a share: 0.01 is one point."""
    experiment: str = "longclip"
    """MLflow experiment of the comparison."""
    directory: str = "var"
    """Local directory for temporary files and, without MLFLOW_TRACKING_URI, for MLflow's database."""
