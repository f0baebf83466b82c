"""Add short summaries to the captions of a Parquet.

Strategies that need no model: first_sentence (as the official code), extractive (the most central sentence), drop_first
(all but the first sentence) and random_sentences (drawn by the row's id). With a model: extractive_embedding, seq2seq,
chat, vllm, and endpoint (a server with OpenAI's interface). What a model writes is checked against its caption; a
summary that fails is replaced by the extractive one, and counted. Give several strategies to keep several summaries of
each caption: training draws among them, so that none of them becomes a shortcut. A job that was killed is finished by
the same command.

    python pipelines/summarize.py --set input=/data/clean --set output=/data/train
    python pipelines/summarize.py --set input=/data/clean --set output=/data/train \\
        --set strategy=[extractive,drop_first]

Out: the input's files and columns with `summary` and `summary_source` (lists, if several strategies are given),
_manifest.json, _quarantine.parquet and _report.html.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field, PositiveInt

from longclip.errors import DataError
from longclip.text.sentences import caption_text
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.entry import Progress, connect, run_entry
from pipelines.common.parquet_set import ParquetSet, open_parquet
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.settings import load_settings
from pipelines.common.storage import Storage, explained, output_path
from pipelines.common.workers import Workers
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Histogram, Sample
from pipelines.data.summaries.piece_task import SOURCE, AddSummaries, SummaryColumns
from pipelines.data.summaries.preflight import check_strategies
from pipelines.data.summaries.summarizers import CONTEXT_LENGTH
from pipelines.data.summaries.vllm_stage import STAGE, generate
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace, claim, fingerprint


class SummarizeSettings(SummaryColumns):
    """Everything that defines the job."""

    input: str
    """Parquet file, directory or URI with captions; all its columns are kept."""
    output: str
    """Directory or URI of the output."""
    rows_per_piece: PositiveInt = 2048
    """Rows that are done, and after a kill done again, as one."""
    workers: Workers = Workers()
    """Processes that hold a model, or vLLM engines; strategies without a model use all CPUs."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Share of rows that may lack a caption before the job fails."""
    overwrite: bool = False
    """Replace a finished output, or unfinished work, of other settings or data."""
    storage: Storage = Storage()


NOT_OF_THE_OUTPUT = {"output", "storage", "overwrite", "max_rejected_fraction", "workers"}
"""Settings that say how the job runs, not what comes out: a run that stopped is finished with others."""

VLLM_STAGE_CPUS = 5
"""Logical CPUs of the stages around vLLM's engines: without them, a local Ray would wait for ever."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(SummarizeSettings, __doc__ or "", argv)
    progress = Progress("summarize")
    check_strategies(settings)
    data = open_parquet("input", settings.input, settings.storage, [settings.columns.caption])
    output = output_path("output", settings.output, settings.storage)
    identity = {
        "job": "summarize",
        "settings": settings.model_dump(mode="json", exclude=NOT_OF_THE_OUTPUT),
        "source": fingerprint("input", settings.input, settings.storage),
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        manifest = work.manifest or summarize(work, settings, data, progress)
        done = "was finished before, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    strategies = ", ".join(settings.strategies)
    detail = f"{done}strategy {strategies}; {counts['fallbacks']} replaced by extractive; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def summarize(work: Workspace, settings: SummarizeSettings, data: ParquetSet, progress: Progress) -> dict[str, Any]:
    """Do what is left of the job, and publish its output; gives the manifest."""
    plan = work.planned("pieces", lambda _: data.pieces(settings.rows_per_piece))
    vllm = "vllm" in settings.strategies
    connect(settings.workers.total_cpus + (VLLM_STAGE_CPUS if vllm else 1))
    limit = RejectedLimit(data.rows, settings.max_rejected_fraction)
    folder = work.folder("summarize")
    if vllm:
        from pipelines.data.summaries.vllm import vllm_summaries  # takes seconds to import, and is rarely needed

        column, engines = (
            settings.columns.caption,
            partial(vllm_summaries, settings=settings.vllm, engines=settings.workers.count),
        )
        generate(work, plan, column, settings.storage, progress, engines)
    task = AddSummaries(settings, settings.storage, folder, work.folder(STAGE), work.tree)
    results = run_units(
        work,
        "summarize",
        plan,
        task,
        progress,
        workers=settings.workers if settings.needs_model else None,
        on_result=limit.add,
    )
    limit.check()
    files = [result["file"] for result in results]
    if not any(file["rows"] for file in files):
        raise DataError(f"input='{settings.input}': no row has a caption in column '{settings.columns.caption}'")
    fallbacks = add_counts(result["fallbacks"] for result in results)
    finished = Finished(
        title="Summaries",
        source=settings.input,
        settings=settings,
        facts=[(f"replaced: {reason}", f"{count:,}") for reason, count in sorted(fallbacks.items())],
        counts={name: sum(result[name] for result in results) for name in ("rows_in", "rows_out", "rejected")}
        | {"fallbacks": fallbacks.total()},
        files=files,
        schema=settings.output_schema(data.schema),
        reasons=[reason for result in results for reason in result["reasons"]],
        histograms=[
            Histogram(title, add_counts(result["tokens"].get(name, {}) for result in results))
            for title, name in (("Captions", "caption"), *((f"Summaries: {s}", s) for s in settings.strategies))
        ],
        stage="summarize",
        sample=lambda row: sample(settings, row),
    )
    return finish(work, finished)


def sample(settings: SummarizeSettings, row: dict[str, Any]) -> Sample:
    """A row of the output, for the report."""
    columns, caption = settings.columns, caption_text(row[settings.columns.caption])
    texts, sources = row[columns.summary], row[SOURCE]
    summaries = dict(zip(sources, texts, strict=True)) if settings.several else {sources: texts}
    cell = row.get(columns.image)
    image = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    tokens = count_tokens(load_tokenizer(None, CONTEXT_LENGTH), [caption])[0]
    return Sample(str(row.get(columns.id, "")), image, caption, summaries, tokens)


if __name__ == "__main__":
    run_entry(main)
