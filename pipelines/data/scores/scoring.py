"""The job of `score.py`: score the pieces, choose the rows to keep, write them, publish the output."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longclip.checkpoint import load_checkpoint
from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import ConfigError, DataError
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.cluster import connect
from pipelines.common.parquet_set import ParquetSet, open_parquet
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.storage import explained, is_local, local_path, output_path
from pipelines.data.histograms import ScoreHistogram
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Sample
from pipelines.data.scores.piece import ScorePiece, read_scores, row_scores
from pipelines.data.scores.settings import NOT_IN_IDENTITY, ScoreSettings
from pipelines.data.scores.writing import WriteScored, output_schema, score_columns
from pipelines.data.summaries.captions import row_caption
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace, claim, fingerprint
from pipelines.registry.model_cache import local_model, model_digest
from pipelines.registry.server import tracking_uri

SCORE, WRITE = "score", "write"


def score(settings: ScoreSettings) -> None:
    """Run the job, or what is left of it, and print its summary line.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the output exists and was made by another job or with other settings, or the input has a column for
            scores already.
        DataError: the input cannot be read, too many of its rows are unusable, or none would be kept.
    """
    progress = Progress("score")
    data = open_parquet("input", settings.input, settings.storage, [settings.columns.image, settings.columns.caption])
    roles = _roles(settings, data)
    output = output_path("output", settings.output, settings.storage)
    cache = local_path("cache", settings.cache)
    registry = tracking_uri(Path(output.path).parent if is_local(output) else cache)
    model = local_model(settings.model, cache, registry, settings.activation)
    context_length = load_checkpoint(model).context_length
    identity = {
        "job": "score",
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY) | {"model": model_digest(model)},
        "source": fingerprint("input", settings.input, settings.storage),
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        task = ScorePiece(settings, model, roles, work.folder(SCORE))
        manifest = work.manifest or _make_output(work, task, data, progress)
        status = "already finished, nothing to do; " if work.manifest else ""
    counts, scores = manifest["counts"], manifest["scores"][settings.score_column]
    detail = (
        f"{status}{counts['low_scores']} left out for their score; mean {scores['mean']:.3f};"
        f" {counts['caption_cut']} of {counts['caption']} captions cut at {context_length} tokens; {output}"
    )
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def _roles(settings: ScoreSettings, data: ParquetSet) -> tuple[str, ...]:
    """Text columns that are scored: captions, and summaries if every file has them."""
    with_summaries = all(settings.columns.summary in file.schema.names for file in data.files)
    roles = ("caption", "summary") if with_summaries else ("caption",)
    for name in score_columns(settings, roles).values():
        for file in data.files:
            if name in file.schema.names:
                raise ConfigError(
                    f"score_column='{settings.score_column}': {file.path.name} has a column '{name}' already; choose"
                    " another, e.g. --set score_column=long_clip_score"
                )
    return roles


def _make_output(work: Workspace, task: ScorePiece, data: ParquetSet, progress: Progress) -> dict[str, Any]:
    """Do the remaining work and publish the output; returns its manifest."""
    settings = task.settings
    plan = work.planned("pieces", lambda _: data.pieces(settings.rows_per_piece))
    connect(settings.workers.total_cpus + 1)
    limit = RejectedLimit(data.rows, settings.max_rejected_fraction)
    results = run_units(work, SCORE, plan, task, progress, workers=settings.workers, on_result=limit.add)
    limit.check()
    scores = np.concatenate([row_scores(read_scores(task.folder, number)) for number in range(len(plan))])
    if not len(scores):
        raise DataError(f"input='{settings.input}': no row can be scored; the first is {limit.example}")
    threshold = _threshold(settings, scores)
    units = [{**piece, "threshold": threshold} for piece in plan]
    written = run_units(work, WRITE, units, WriteScored(settings, task.roles, task.folder, work.tree), progress)
    rows_out = sum(result["rows_out"] for result in written)
    counts = {
        "rows_in": sum(result["rows_in"] for result in results),
        "rows_out": rows_out,
        "rejected": sum(result["rejected"] for result in results),
        "low_scores": len(scores) - rows_out,
        **{name: 0 for role in task.roles for name in (role, f"{role}_cut")},
    }
    finished = Finished(
        title="CLIP scores",
        source=settings.input,
        settings=settings,
        facts=[
            ("model", settings.model),
            *([("lowest score kept", f"{threshold:.4f}")] if threshold is not None else []),
        ],
        counts=counts | add_counts(result["texts"] for result in results),
        files=[result["file"] for result in written],
        schema=output_schema(settings, task.roles, data.schema),
        reasons=[reason for result in results for reason in result["reasons"]],
        histograms=[ScoreHistogram(settings.score_column, scores, threshold)],
        stage=SCORE,
        sample=partial(_sample, settings),
    )
    return finish(work, finished)


def _threshold(settings: ScoreSettings, scores: np.ndarray) -> float | None:
    """Lowest score that is kept; None to keep all rows."""
    if settings.min_score is not None:
        if scores.max() < settings.min_score:
            raise DataError(
                f"min_score={settings.min_score} leaves no row: the highest score is {scores.max():.4f}; lower it, or"
                " use keep_share"
            )
        return settings.min_score
    if settings.keep_share is None:
        return None
    rows = max(1, round(settings.keep_share * len(scores)))
    return float(np.partition(scores, -rows)[-rows])


def _sample(settings: ScoreSettings, row: dict[str, Any]) -> Sample:
    """A row of the output, for the report."""
    caption = row_caption(row[settings.columns.caption])[0]
    cell = row[settings.columns.image]
    image = cell.get("bytes") if isinstance(cell, dict) else cell
    tokens = count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), [caption])[0]
    shown = {name: str(row[name]) for name in (settings.score_column, settings.summary_score_column) if name in row}
    return Sample(str(row.get(settings.columns.id, "")), image, caption, shown, tokens)
