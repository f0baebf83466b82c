"""The job of `promote.py`: measure candidate and champion, check the gates, and move the alias."""

import json
from typing import Any

from longclip.errors import PromotionError
from longclip.model_uri import ModelUri
from pipelines.common.events import report
from pipelines.common.progress import Progress
from pipelines.common.settings import dump
from pipelines.common.storage import local_path
from pipelines.evaluation.gates import Gate, gate, gate_table
from pipelines.evaluation.measure_job import MeasureJob, measure_job
from pipelines.evaluation.measured import Measured, compare
from pipelines.evaluation.results import task_result
from pipelines.evaluation.settings import PromoteSettings
from pipelines.registry.runs import end_run, log_documents, start_run
from pipelines.registry.server import tracking_uri
from pipelines.registry.versions import alias_version, move_alias


def promote(settings: PromoteSettings) -> None:
    """Promote the candidate if all gates hold, and print the summary line.

    Raises:
        PromotionError: there is no candidate, a gate fails, or the alias was moved in the meantime.
    """
    progress = Progress("promote")
    directory = local_path("directory", settings.directory)
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
        gates, rows = _decide(settings, job, champion, candidate)
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


def _decide(settings: PromoteSettings, job: MeasureJob, champion: str | None, candidate: str) -> tuple[list[Gate], int]:
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
            directions = measured["champion"].compared
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
