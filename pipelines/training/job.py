"""The job of `finetune.py`: check model and data, train on Ray Train, keep the chosen checkpoint."""

import shutil
from pathlib import Path

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from upath import UPath

from longclip.files import whole_directory
from pipelines.common.cluster import connect
from pipelines.common.model_inputs import ModelInputs
from pipelines.common.parquet_set import is_list
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import QUARANTINE, start_quarantine, write_quarantine
from pipelines.common.run_directory import claim_directory
from pipelines.common.settings import dump
from pipelines.common.storage import local_path
from pipelines.registry.runs import continue_run, end_run, start_run
from pipelines.registry.server import tracking_uri
from pipelines.training.callbacks import MetricsToMlflow, MetricsToPrometheus
from pipelines.training.checkpoints import MODEL_DIR
from pipelines.training.initial_model import initial_checkpoint
from pipelines.training.lineage import log_origin, run_origin
from pipelines.training.loop import train_loop
from pipelines.training.row_feed import POSITION
from pipelines.training.row_source import Source, training_rows, validation_rows
from pipelines.training.settings import DATA_CPUS, FinetuneSettings

RUN_DIR = ".run"
RUN_ID = "mlflow_run_id"
"""File of the output: the MLflow run that a resumed job continues."""


def finetune(settings: FinetuneSettings) -> None:
    """Run the training, or what is left of it, and print its summary line.

    Raises:
        CheckpointError: the base model cannot be read.
        ConfigError: the output holds a run with other settings, or MLflow cannot be reached.
        DataError: the rows cannot be read, are too few, or too many of them are unusable.
    """
    progress = Progress("finetune")
    output = local_path("output", settings.output)
    checkpoint = initial_checkpoint(settings)
    train, validation = training_rows(settings), validation_rows(settings)
    origin = run_origin(settings, train, validation)
    # After the checks: settings that are refused must not claim the directory.
    claim_directory("output", output, settings, FinetuneSettings.identity)

    connect(settings.workers.total_cpus + DATA_CPUS)
    rows = train.data.rows + (validation.data.rows if validation else 0)
    quarantine = start_quarantine(rows, settings.max_rejected_fraction)
    inputs = ModelInputs(
        settings.columns,
        {name: settings.data.candidates if is_list(train.data.schema, name) else 1 for name in settings.text_columns},
        checkpoint.transform,
        settings.model.base,
        checkpoint.context_length,
        quarantine,
        keep=[POSITION],
    )
    held_out = f", validated on {validation.steps * settings.streams}" if validation else ""
    print(
        f"training {train.steps} steps of {settings.global_batch_size} pairs, {train.data.rows} rows{held_out}",
        flush=True,
    )

    uri = tracking_uri(output.parent)
    run_id = _started_run(uri, settings, output)
    log_origin(uri, run_id, origin, train, validation)
    least, most = settings.workers.min_count, settings.workers.count
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "settings": dump(settings),
            "lineage": origin.lineage(run_id),
            "run_directory": str(output / RUN_DIR),
            "train": Source(train, inputs),
            "validation": Source(validation, inputs) if validation else None,
            "quarantine": quarantine,
        },
        scaling_config=ScalingConfig(
            num_workers=(least, most) if least else most,
            use_gpu=settings.workers.use_gpu,
            resources_per_worker={"CPU": settings.workers.cpus} | ({"GPU": 1} if settings.workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=RUN_DIR,
            storage_path=str(output),
            checkpoint_config=CheckpointConfig(
                num_to_keep=settings.checkpoints.keep, checkpoint_score_attribute=settings.score if validation else None
            ),
            failure_config=FailureConfig(max_failures=settings.workers.max_failures),
            callbacks=[MetricsToMlflow(uri, run_id), MetricsToPrometheus(output.name)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except BaseException:
        end_run(uri, run_id, succeeded=False)
        raise
    chosen = result.checkpoint
    if settings.checkpoints.publish == "best":
        chosen = result.get_best_checkpoint(settings.score, "max")
    with whole_directory(output / MODEL_DIR) as directory:
        shutil.copytree(Path(chosen.path) / MODEL_DIR, directory, dirs_exist_ok=True)
    end_run(uri, run_id, succeeded=True)
    reasons = ray.get(quarantine.reasons.remote())
    write_quarantine(reasons, settings.input, "finetune", UPath(output / QUARANTINE))
    pairs_per_epoch = train.order.steps_per_epoch * settings.global_batch_size
    progress.summary(
        rows,
        rows - len(reasons),
        len(reasons),
        f"{pairs_per_epoch * settings.optim.epochs} pairs seen, {pairs_per_epoch} of {train.data.rows} rows per epoch;"
        f" checkpoint {output / MODEL_DIR}; MLflow run {run_id} at {uri}",
    )


def _started_run(uri: str, settings: FinetuneSettings, output: Path) -> str:
    """The MLflow run of an interrupted job with this output, or a new one; returns its id.

    A copy of an output under another name gets a run of its own.
    """
    file = output / RUN_ID
    if file.is_file() and continue_run(uri, run_id := file.read_text().strip(), output.name):
        return run_id
    run_id = start_run(uri, settings.experiment, output.name, dump(settings))
    file.write_text(f"{run_id}\n")
    return run_id
