"""Make the candidate champion, if it is better: both are measured on the same tasks and compared query by query.

On tasks of long text the candidate must have as many hits at 1 as the champion, or more. On short text and zero-shot
it must not lose more than `margin`: the 95 % interval of the paired difference has to lie above that, so a set too
small to show it does not let anything pass. Where all gates hold, the alias is moved; the comparison is kept as
artifacts of an MLflow run, whatever it says. Where there is no champion, the candidate becomes it.

    python pipelines/promote.py --set tasks.urban1k.input=/data/Urban1k --set tasks.coco5k.input=/data/coco \\
        --set tasks.cifar10.input=/data/cifar-10-binary.tar.gz

Run twice, the second run finds nothing to do. Of two runs at once, one moves the alias and the other is refused. Exit
code 6 means that the champion stays. `rollback.py` goes back.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from longclip.errors import PromotionError
from longclip.model_uri import ModelUri
from pipelines.common.entry import run_entry
from pipelines.common.events import report
from pipelines.common.progress import Progress
from pipelines.common.settings import dump, load_settings
from pipelines.common.storage import storage_path
from pipelines.evaluation.gates import Gate, gate, gate_table
from pipelines.evaluation.measure_job import MeasureJob, MeasureSettings, measure_job
from pipelines.evaluation.measured import Measured, compare
from pipelines.evaluation.results import task_result
from pipelines.registry.runs import end_run, log_documents, start_run
from pipelines.registry.server import tracking_uri
from pipelines.registry.versions import alias_version, move_alias


class PromoteSettings(MeasureSettings):
    """Everything that defines a promotion."""

    name: str = "longclip"
    """Registered model."""
    candidate: str = "candidate"
    """Alias of the version that may become champion."""
    champion: str = "champion"
    """Alias that is moved."""
    margin: float = Field(default=0.01, ge=0, lt=1)
    """Share of hits at 1 that may be lost on short text and zero-shot: 0.01 is one point."""
    experiment: str = "longclip"
    """MLflow experiment of the comparison."""
    directory: str = "var"
    """Local directory for scratch files and, without MLFLOW_TRACKING_URI, of MLflow's database."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(PromoteSettings, __doc__ or "", argv)
    progress = Progress("promote")
    directory = Path(storage_path("directory", settings.directory))
    uri = tracking_uri(directory)
    candidate = alias_version(uri, settings.name, settings.candidate)
    champion = alias_version(uri, settings.name, settings.champion)
    if candidate is None:
        raise PromotionError(
            f"'{settings.name}' has no alias '{settings.candidate}' at {uri}; register a checkpoint with --set"
            f" alias={settings.candidate} first"
        )
    if candidate == champion:
        progress.summary(0, 0, 0, f"version {candidate} is '{settings.champion}' already")
        return
    with measure_job(settings, directory) as job:
        gates, rows = decide(settings, job, champion, candidate)
    failed = [found for found in gates if not found.holds]
    if failed:
        first = failed[0]
        raise PromotionError(
            f"version {candidate} is not made '{settings.champion}', version {champion} stays: {len(failed)} of"
            f" {len(gates)} gates fail, first {first.task} {first.direction}: {100 * first.comparison.difference:+.1f}"
            f" points [{100 * first.comparison.low:+.1f}, {100 * first.comparison.high:+.1f}], must be {first.rule}"
        )
    move_alias(uri, settings.name, settings.champion, champion, candidate)
    before = f"version {champion}" if champion else "nothing"
    progress.summary(rows, rows, 0, f"'{settings.champion}' moved from {before} to version {candidate}")


def decide(settings: PromoteSettings, job: MeasureJob, champion: str | None, candidate: str) -> tuple[list[Gate], int]:
    """All gates, and the rows that were measured. The comparison is kept in a run of its own.

    The candidate is measured, and its files so verified, even where there is no champion to compare it with.
    """
    versions = {name: version for name, version in (("champion", champion), ("candidate", candidate)) if version}
    models = {name: job.model(str(ModelUri(settings.name, version))) for name, version in versions.items()}
    gates: list[Gate] = []
    results: list[dict[str, Any]] = []
    rows = 0
    for task in job.tasks:
        measured: dict[str, Measured] = {}
        for name, model in models.items():
            report(f"embedding with {name} (version {versions[name]}): {task.name}")
            measured[name] = job.measure(model, task)
        rows += measured["candidate"].images
        results.append(task_result(task, measured, versions, next(iter(models)), {}))
        if champion is not None:
            directions = measured["champion"].whole
            comparisons = {name: compare(measured["champion"], measured["candidate"], name) for name in directions}
            gates += [gate(task, name, found, settings.margin) for name, found in comparisons.items()]
    table = gate_table(gates, champion or "(none)", candidate).markdown()
    print(f"\n{table}\n", flush=True)
    run_id = start_run(job.tracking_uri, settings.experiment, f"promote-{settings.name}", dump(settings))
    document = {"champion": champion, "candidate": candidate, "holds": all(found.holds for found in gates)}
    log_documents(
        job.tracking_uri,
        run_id,
        {"comparison.md": f"{table}\n", "comparison.json": json.dumps(document | {"tasks": results}, indent=2)},
    )
    end_run(job.tracking_uri, run_id, succeeded=True)
    return gates, rows


if __name__ == "__main__":
    run_entry(main)
