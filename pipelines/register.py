"""Register a checkpoint directory in MLflow as a new version of a model, and set an alias to it.

    python pipelines/register.py --set checkpoint=var/finetune/checkpoint --set name=longclip --set alias=candidate

Serve that version by its name: `serve run serving.app:build model=models:/longclip@candidate ...`.
"""

import json
from collections.abc import Sequence
from typing import Literal

from longclip.errors import CheckpointError, DataError
from longclip.model_uri import ModelUri
from pipelines.common.entry import run_entry
from pipelines.common.progress import Progress
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import local_path


class RegisterSettings(Settings):
    """Settings of a version."""

    checkpoint: str
    """Checkpoint directory; its last part must be `checkpoint`."""
    name: str = "longclip"
    """Registered model."""
    alias: Literal["candidate", "champion"] = "candidate"
    """Alias to set to the new version."""
    results: str | None = None
    """results.json of a benchmark; its figures are recorded with the version and in its model card."""
    results_model: str | None = None
    """Name of this checkpoint in those results; null for the last one."""
    experiment: str = "longclip"
    """MLflow experiment."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(RegisterSettings, __doc__ or "", argv)
    progress = Progress("register")
    directory = local_path("checkpoint", settings.checkpoint)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint '{directory}' does not exist; give the directory that finetune wrote")
    metrics = _figures(settings) if settings.results else {}
    from pipelines.registry.registration import (  # imports torch and MLflow, which --help does not need
        register_checkpoint,
    )
    from pipelines.registry.server import tracking_uri

    uri, measured = tracking_uri(directory.parent.parent), _measured(settings)
    version = register_checkpoint(uri, directory, settings.name, settings.experiment, metrics, settings.alias, measured)
    progress.summary(1, 1, 0, f"{ModelUri(settings.name, str(version))}, alias {settings.alias}, at {uri}")


def _figures(settings: RegisterSettings) -> dict[str, float]:
    path = local_path("results", str(settings.results))
    try:
        results = json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"results='{path}' is not a results.json of a benchmark ({type(error).__name__})") from error
    name = settings.results_model or list(results)[-1]
    if name not in results:
        raise DataError(f"results_model='{name}' is not in {path}; it has {', '.join(results)}")
    return {key: float(value) for key, value in results[name].items() if isinstance(value, int | float)}


def _measured(settings: RegisterSettings) -> list[str]:
    """The first table of each task, of this model alone; the benchmark wrote a JSON per task next to results.json."""
    if not settings.results:
        return []
    from pipelines.evaluation.report import tables

    sections = []
    path = local_path("results", settings.results)
    for file in sorted(path.parent.glob("*.json")):
        if file != path:
            result = json.loads(file.read_text())
            name = settings.results_model or list(result["models"])[-1]
            alone = result | {"models": {name: result["models"][name]}, "comparisons": [], "paper_figures": []}
            sections.append(f"### {result['task']}: {result['protocol']}\n\n{next(tables(alone)).markdown()}")
    return sections


if __name__ == "__main__":
    run_entry(main)
