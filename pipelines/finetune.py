"""Fine-tune a CLIP on long captions and their summaries, on any number of workers.

The text positions are stretched (77 -> 248), long captions are matched to the image features, and summaries to their
primary components (Long-CLIP, arXiv 2403.15378). With model.architecture the same code trains a small CLIP from
scratch. A broken run is resumed by the same command.

    python pipelines/finetune.py --config pipelines/configs/finetune.yaml \\
        --set data.train=/data/train --set model.base=openai/clip-vit-base-patch16 --set output=/data/run1

    ray job submit --working-dir . -- python pipelines/finetune.py --config ... --set output=$PWD/var/run1
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import ray
import yaml
from ray.data import FileShuffleConfig
from ray.train import CheckpointConfig, DataConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from longclip.errors import ConfigError, DataError
from longclip.files import whole_directory
from pipelines import tracking
from pipelines.entry import Progress, connect, run_entry
from pipelines.finetune_settings import FinetuneSettings, initial_checkpoint
from pipelines.model_inputs import ModelInputs
from pipelines.parquet_files import is_list, open_parquet
from pipelines.records import start_quarantine, write_quarantine
from pipelines.settings import dump, load_settings, storage_path
from pipelines.train_loop import MODEL_DIR, train_loop

DATA_CPUS = 3
"""Logical CPUs of the data pipeline on a local Ray: one more than the two cores that such a machine has at least, for
the moments in which a task only hands over its rows (measured: 15 % more rows per second)."""

SETTINGS_FILE = "settings.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(FinetuneSettings, __doc__ or "", argv)
    progress = Progress("finetune")
    output = Path(storage_path("output", settings.output))
    checkpoint = initial_checkpoint(settings)
    texts = [settings.columns.caption] + ([settings.columns.summary] if settings.uses_summaries else [])
    columns = [settings.columns.id, settings.columns.image, *texts]
    train = open_parquet("data.train", settings.data.train, settings.storage, columns, split="train")
    rows = train.rows
    steps_per_epoch = rows // settings.global_batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"data.train='{train.root}' has {rows} rows, fewer than one global batch of {settings.global_batch_size}"
            f" ({settings.workers.count} workers x optim.per_worker_batch_size={settings.optim.per_worker_batch_size});"
            " give more rows or a smaller batch"
        )
    total_steps = steps_per_epoch * settings.optim.epochs
    _claim_output(output, settings)  # only now: a run that was refused must not claim the directory for its mistake

    connect(settings.workers.count * settings.workers.cpus + DATA_CPUS)
    quarantine = start_quarantine(rows, settings.data.max_rejected_fraction)
    candidates = {name: settings.data.candidates if is_list(train.schema, name) else 1 for name in texts}
    inputs = ModelInputs(
        settings.columns, candidates, checkpoint.transform, settings.model.base, checkpoint.context_length, quarantine
    )
    files = train.dataset(columns, shuffle=FileShuffleConfig(seed=settings.seed))
    dataset = files.map_batches(inputs, batch_size=64)
    print(f"training {total_steps} steps of {settings.global_batch_size} pairs, {rows} rows", flush=True)

    uri = tracking.tracking_uri(output.parent)
    run_id = tracking.start_run(uri, settings.experiment, output.name, dump(settings))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"settings": dump(settings), "total_steps": total_steps},
        scaling_config=ScalingConfig(
            num_workers=settings.workers.count,
            use_gpu=settings.workers.use_gpu,
            resources_per_worker={"CPU": settings.workers.cpus} | ({"GPU": 1} if settings.workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=".run",
            storage_path=str(output),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[tracking.MetricsToMlflow(uri, run_id)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(datasets_to_split=["train"]),
    )
    try:
        result = trainer.fit()
    except BaseException:
        tracking.end_run(uri, run_id, succeeded=False)
        raise
    tracking.end_run(uri, run_id, succeeded=True)

    with result.checkpoint.as_directory() as directory, whole_directory(output / MODEL_DIR) as aside:
        shutil.copytree(Path(directory) / MODEL_DIR, aside, dirs_exist_ok=True)
    reasons = ray.get(quarantine.reasons.remote())
    write_quarantine(reasons, settings.data.train, "finetune", output / "quarantine.parquet")
    seen = total_steps * settings.global_batch_size
    progress.summary(
        rows,
        rows - len(reasons),
        len(reasons),
        f"{seen} pairs seen, {steps_per_epoch * settings.global_batch_size} of {rows} rows a pass;"
        f" checkpoint {output / MODEL_DIR}; MLflow run {run_id} at {uri}",
    )


def _claim_output(output: Path, settings: FinetuneSettings) -> None:
    """A run is resumed by the same settings only: others in the same directory would mix two experiments."""
    path = output / SETTINGS_FILE
    ours = dump(settings)
    if path.is_file():
        theirs = yaml.safe_load(path.read_text())
        if theirs != ours:
            different = sorted(key for key in ours if theirs.get(key) != ours[key])
            raise ConfigError(
                f"output='{output}' holds a run with other settings ({', '.join(different)}); choose another output,"
                " or remove that directory to start again"
            )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(ours, sort_keys=False))


if __name__ == "__main__":
    run_entry(main)
