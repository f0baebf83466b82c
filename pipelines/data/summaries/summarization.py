"""The job of `summarize.py`: plan the pieces, summarize them, publish the output."""

from functools import partial
from typing import Any

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.cluster import connect
from pipelines.common.parquet_set import ParquetSet, open_parquet
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.storage import explained, output_path
from pipelines.data.histograms import LengthHistogram
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Sample
from pipelines.data.summaries.captions import row_caption
from pipelines.data.summaries.piece_task import SOURCE, AddSummaries, output_schema
from pipelines.data.summaries.preflight import check_strategies
from pipelines.data.summaries.settings import NOT_IN_IDENTITY, SummarizeSettings
from pipelines.data.summaries.vllm_stage import STAGE, generate
from pipelines.data.vllm_settings import VLLM_STAGE_CPUS
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace, claim, fingerprint


def summarize(settings: SummarizeSettings) -> None:
    """Run the job, or what is left of it, and print its summary line.

    Raises:
        CheckpointError: the model of a strategy cannot be used.
        ConfigError: the output exists and was made by another job or with other settings, or a package is missing.
        DataError: the input cannot be read, or too many of its rows have no caption.
    """
    progress = Progress("summarize")
    check_strategies(settings)
    data = open_parquet("input", settings.input, settings.storage, [settings.columns.caption])
    output = output_path("output", settings.output, settings.storage)
    identity = {
        "job": "summarize",
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY),
        "source": fingerprint("input", settings.input, settings.storage),
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        manifest = work.manifest or _make_output(work, settings, data, progress)
        status = "already finished, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    strategies = ", ".join(settings.strategies)
    detail = f"{status}strategy {strategies}; {counts['fallbacks']} replaced by extractive; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def _make_output(work: Workspace, settings: SummarizeSettings, data: ParquetSet, progress: Progress) -> dict[str, Any]:
    """Do the remaining work and publish the output; returns its manifest."""
    plan = work.planned("pieces", lambda _: data.pieces(settings.rows_per_piece))
    uses_vllm = "vllm" in settings.strategies
    connect(settings.workers.total_cpus + (VLLM_STAGE_CPUS if uses_vllm else 1))
    limit = RejectedLimit(data.rows, settings.max_rejected_fraction)
    folder = work.folder("summarize")
    if uses_vllm:
        from pipelines.data.summaries.vllm import vllm_summaries  # takes seconds to import, and is rarely needed

        engines = partial(vllm_summaries, settings=settings.vllm, engines=settings.workers.count)
        generate(work, plan, settings.columns.caption, settings.storage, progress, engines)
    results = run_units(
        work,
        "summarize",
        plan,
        AddSummaries(settings, folder, work.folder(STAGE), work.tree),
        progress,
        workers=settings.workers if settings.needs_model else None,
        on_result=limit.add,
    )
    limit.check()
    files = [result["file"] for result in results]
    if not any(file["rows"] for file in files):
        raise DataError(
            f"input='{settings.input}': no row has a caption in column '{settings.columns.caption}'; name another with"
            " --set columns.caption=<column>"
        )
    fallbacks = add_counts(result["fallbacks"] for result in results)
    counts = {name: sum(result[name] for result in results) for name in ("rows_in", "rows_out", "rejected")}
    finished = Finished(
        title="Summaries",
        source=settings.input,
        settings=settings,
        facts=[(f"replaced: {reason}", f"{count:,}") for reason, count in sorted(fallbacks.items())],
        counts=counts | {"fallbacks": fallbacks.total()},
        files=files,
        schema=output_schema(settings, data.schema),
        reasons=[reason for result in results for reason in result["reasons"]],
        histograms=[
            LengthHistogram(title, add_counts(result["tokens"].get(name, {}) for result in results))
            for title, name in (("Captions", "caption"), *((f"Summaries: {s}", s) for s in settings.strategies))
        ],
        stage="summarize",
        sample=partial(_sample, settings),
    )
    return finish(work, finished)


def _sample(settings: SummarizeSettings, row: dict[str, Any]) -> Sample:
    """A row of the output, for the report."""
    columns, caption = settings.columns, row_caption(row[settings.columns.caption])[0]
    texts, sources = row[columns.summary], row[SOURCE]
    summaries = dict(zip(sources, texts, strict=True)) if settings.several else {sources: texts}
    cell = row.get(columns.image)
    image = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    tokens = count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), [caption])[0]
    return Sample(str(row.get(columns.id, "")), image, caption, summaries, tokens)
