"""Make the candidate the champion if it is better on the same tasks, compared query by query.

    python pipelines/promote.py --set tasks.urban1k.input=/data/Urban1k --set tasks.coco5k.input=/data/coco \\
        --set tasks.cifar10.input=/data/cifar-10-binary.tar.gz

On tasks of long text the candidate must have at least as many hits at 1 as the champion. On short text and zero-shot
the 95 % interval of the paired difference must be above -`margin`, so a data set too small to show that lets no
candidate pass. If all gates hold, the alias is moved. The comparison is logged to an MLflow run in any case. Without a
champion, the candidate becomes it.

A second run has nothing to do. Of two concurrent runs, one moves the alias and the other fails. Exit code 6 means that
the champion is unchanged. `rollback.py` undoes a promotion.
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
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
    failed = [checked for checked in gates if not checked.holds]
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
    """All gates, and the number of rows measured. Logs the comparison to a new MLflow run.

    The candidate is measured even if there is no champion, which verifies its files.
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
            gates += [gate(task, name, comparison, settings.margin) for name, comparison in comparisons.items()]
    table = gate_table(gates, champion or "(none)", candidate).markdown()
    print(f"\n{table}\n", flush=True)
    run_id = start_run(job.tracking_uri, settings.experiment, f"promote-{settings.name}", dump(settings))
    document = {"champion": champion, "candidate": candidate, "holds": all(checked.holds for checked in gates)}
    log_documents(
        job.tracking_uri,
        run_id,
        {"comparison.md": f"{table}\n", "comparison.json": json.dumps(document | {"tasks": results}, indent=2)},
    )
    end_run(job.tracking_uri, run_id, succeeded=True)
    return gates, rows


if __name__ == "__main__":
    run_entry(main)
