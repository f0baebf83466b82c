"""The job of `promote.py`: measure candidate and champion, check the gates, and move the alias."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from longclip.errors import ConfigError, PromotionError
from longclip.model_uri import ModelUri
from pipelines.common.events import report, warn
from pipelines.common.progress import Progress
from pipelines.common.settings import dump
from pipelines.common.storage import local_path
from pipelines.evaluation.gates import Gate, gate, gate_table
from pipelines.evaluation.measure_job import MeasureJob, measure_job
from pipelines.evaluation.measured import Measured, compare
from pipelines.evaluation.report import tables
from pipelines.evaluation.results import flat_figures, task_result
from pipelines.evaluation.settings import PromoteSettings
from pipelines.registry.cards import add_to_card
from pipelines.registry.model_card import PROMOTION
from pipelines.registry.runs import end_run, log_documents, log_metrics, log_models, start_run, tag_run
from pipelines.registry.server import tracking_uri
from pipelines.registry.versions import (
    PROMOTION_TAG,
    REFUSAL_TAG,
    alias_version,
    logged_model_id,
    move_alias,
    tag_version,
)


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
        decision = _decide(settings, job, champion, candidate)
    failed = [checked for checked in decision.gates if not checked.holds]
    if failed:
        first = failed[0]
        outcome = f"Refused as `{settings.champion}`: {len(failed)} of {len(decision.gates)} gates fail."
        _record(uri, settings, candidate, decision, outcome, promoted=False)
        raise PromotionError(
            f"version {candidate} is not made '{settings.champion}', version {champion} stays: {len(failed)} of"
            f" {len(decision.gates)} gates fail, first {first.task} {first.direction}:"
            f" {100 * first.comparison.difference:+.1f} points [{100 * first.comparison.low:+.1f},"
            f" {100 * first.comparison.high:+.1f}], must be {first.rule}"
        )
    tags = {PROMOTION_TAG: decision.run_id}
    move_alias(uri, settings.name, settings.champion, champion, candidate, tags=tags)
    before = f"version {champion}" if champion else "nothing"
    _record(uri, settings, candidate, decision, f"Made `{settings.champion}` in place of {before}.", promoted=True)
    moved = f"'{settings.champion}' moved from {before} to version {candidate}"
    progress.summary(decision.rows, decision.rows, 0, moved)


@dataclass(frozen=True)
class Decision:
    """All gates and what was measured for them."""

    gates: list[Gate]
    table: str
    results: list[dict[str, Any]]
    rows: int
    """Rows that were measured."""
    run_id: str
    """MLflow run with the comparison."""

    def section(self, outcome: str) -> str:
        """The section of the candidate's model card, in Markdown."""
        parts = [f"{outcome} MLflow run `{self.run_id}`, {datetime.now(UTC).date()}."]
        parts += [self.table] if self.gates else []
        for result in self.results:
            parts += [f"### {result['task']}: {result['protocol']}", next(tables(result)).markdown()]
        return "\n\n".join(parts)


def _decide(settings: PromoteSettings, job: MeasureJob, champion: str | None, candidate: str) -> Decision:
    """Measure, check all gates, and log the comparison to a new MLflow run.

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
    run_id = _log(settings, job.tracking_uri, versions, gates, table, results)
    return Decision(gates, table, results, rows, run_id)


def _log(
    settings: PromoteSettings,
    uri: str,
    versions: dict[str, str],
    gates: list[Gate],
    table: str,
    results: list[dict[str, Any]],
) -> str:
    """Log a comparison to a new MLflow run; returns its id.

    The figures of the candidate become metrics of its version, the differences metrics of the run alone.
    """
    run_id = start_run(uri, settings.experiment, f"promote-{settings.name}", dump(settings))
    tag_run(uri, run_id, {"model": settings.name} | {f"{name}_version": number for name, number in versions.items()})
    model_ids = {name: logged_model_id(uri, settings.name, number) for name, number in versions.items()}
    log_models(uri, run_id, [model_id for model_id in model_ids.values() if model_id])
    log_metrics(uri, run_id, flat_figures(results)["candidate"], model_ids["candidate"])
    log_metrics(uri, run_id, {name: value for checked in gates for name, value in checked.metrics().items()})
    document = {
        "champion": versions.get("champion"),
        "candidate": versions["candidate"],
        "holds": all(checked.holds for checked in gates),
        "tasks": results,
    }
    log_documents(uri, run_id, {"comparison.md": f"{table}\n", "comparison.json": json.dumps(document, indent=2)})
    end_run(uri, run_id, succeeded=True)
    return run_id


def _record(
    uri: str, settings: PromoteSettings, candidate: str, decision: Decision, outcome: str, promoted: bool
) -> None:
    """Write the outcome to the run of the comparison and to the candidate.

    If MLflow does not take it, this prints a warning and raises nothing: the alias is moved already, or stays.
    """
    try:
        tag_run(uri, decision.run_id, {"promoted": str(promoted).lower()})
        if not promoted:  # a promotion is tagged together with the move of the alias
            tag_version(uri, settings.name, candidate, {REFUSAL_TAG: decision.run_id})
    except ConfigError as error:
        warn(f"the outcome is not recorded in run {decision.run_id}: {error}")
    add_to_card(uri, settings.name, candidate, PROMOTION, decision.section(outcome))
