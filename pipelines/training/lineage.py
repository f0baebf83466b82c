"""What a run records about itself in its checkpoints and in MLflow: its data, base model and code."""

import json
from dataclasses import dataclass
from pathlib import Path

from longclip import __version__
from longclip.checkpoint import checkpoint_directory, checkpoint_id
from longclip.lineage import Lineage, model_name, read_lineage
from pipelines.common.data_digest import DataDigest, data_digest
from pipelines.registry.datasets import log_data
from pipelines.registry.runs import git_commit, log_documents
from pipelines.training.row_source import Rows
from pipelines.training.settings import FinetuneSettings


@dataclass(frozen=True)
class RunOrigin:
    """Everything that a run starts from, before it has an id."""

    data: DataDigest
    validation: DataDigest | None
    base: str | None
    base_checkpoint_id: str | None
    base_run_id: str | None

    def lineage(self, run_id: str) -> Lineage:
        """Lineage of the checkpoints of a run."""
        return Lineage(
            run_id=run_id,
            data_digest=self.data.digest,
            data_digest_of=self.data.of,
            base=self.base,
            base_checkpoint_id=self.base_checkpoint_id,
            base_run_id=self.base_run_id,
            code_version=__version__,
            git_commit=git_commit(),
        )


def run_origin(settings: FinetuneSettings, train: Rows, validation: Rows | None) -> RunOrigin:
    """Identify data and base model; reads the weights of the base once.

    Raises:
        DataError: the storage of the data cannot be read.
    """
    base = settings.model.base
    directory = checkpoint_directory(base) if base else None
    held_out = settings.validation.input
    return RunOrigin(
        data=data_digest("input", train.data),
        validation=data_digest("validation.input" if held_out else "input", validation.data) if validation else None,
        base=model_name(directory) if directory and Path(str(base)).is_dir() else base,
        base_checkpoint_id=checkpoint_id(directory) if directory else None,
        base_run_id=read_lineage(directory).run_id if directory else None,
    )


def log_origin(uri: str, run_id: str, origin: RunOrigin, train: Rows, validation: Rows | None) -> None:
    """Log the data as inputs of an MLflow run, and the manifest of the training data as its artifact.

    Raises:
        ConfigError: the tracking server does not take them.
    """
    log_data(uri, run_id, "training", train.data, origin.data)
    if validation and origin.validation:
        log_data(uri, run_id, "validation", validation.data, origin.validation)
    if origin.data.manifest:
        log_documents(uri, run_id, {"data_manifest.json": json.dumps(origin.data.manifest, indent=2)})
