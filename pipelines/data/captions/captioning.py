"""The job of `caption.py`: plan the pieces, ask the model about their images, write the captioned rows, publish."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import ray
from upath import UPath

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import DataError
from longclip.text.sentences import caption_text
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.cluster import connect
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.storage import explained, output_path
from pipelines.data.captions.endpoint import PIECES_AT_ONCE, AskEndpoint
from pipelines.data.captions.piece import STOPPED, CaptionJob
from pipelines.data.captions.prompting import load_prompt
from pipelines.data.captions.settings import NOT_IN_IDENTITY, CaptionSettings
from pipelines.data.captions.spending import Budget, BudgetError
from pipelines.data.captions.vision_model import AskVisionModel, checked_source
from pipelines.data.captions.writing import WriteCaptions, output_schema
from pipelines.data.histograms import LengthHistogram
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Sample
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.source import Source
from pipelines.data.vllm_settings import VLLM_STAGE_CPUS
from pipelines.data.work_units import finished_results, run_units
from pipelines.data.workspace import Workspace, claim, fingerprint

ASK, WRITE, JOURNALS = "ask", "write", "journals"


def caption(settings: CaptionSettings) -> None:
    """Run the job, or what is left of it, and print its summary line.

    Raises:
        BudgetError: it stopped because it has used `max_total_tokens`.
        CheckpointError: the model cannot be used.
        ConfigError: the output exists and was made by another job or with other settings, the prompt cannot be used, or
            the server rejects the requests.
        DataError: the input cannot be read, or too many of its rows are unusable.
    """
    progress = Progress("caption")
    prompt = load_prompt(settings)
    _check_strategy(settings)
    source = open_source("input", settings.input, settings.source, settings.storage, captions_required=False)
    output = output_path("output", settings.output, settings.storage)
    print(source.describe(), flush=True)
    identity = {
        "job": "caption",
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY) | {"prompt": prompt.digest},
        "source": fingerprint("input", settings.input, settings.storage),
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        job = CaptionJob(source, settings, prompt, work.partial / JOURNALS)
        manifest = work.manifest or _make_output(work, job, progress)
        status = "already finished, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    if work.manifest:
        counts.pop("requests_in_flight", None)  # of the run that made the output
    detail = f"{status}{_spent(counts, settings)}; {_treated(counts)}; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def _check_strategy(settings: CaptionSettings) -> None:
    """Find missing packages and unusable models before the job starts."""
    if settings.strategy == "transformers":
        checked_source(settings.transformers)
    elif settings.strategy == "vllm":
        from pipelines.data.captions.vllm import INSTEAD  # imports ray.data.llm, which takes seconds
        from pipelines.data.vllm_engine import vllm_config

        vllm_config(settings.vllm, settings.workers.count, INSTEAD)


def _make_output(work: Workspace, job: CaptionJob, progress: Progress) -> dict[str, Any]:
    """Do the remaining work and publish the output; returns its manifest."""
    settings = job.settings
    plan = work.planned("pieces", partial(_pieces, job.source, settings.limit))
    if not plan:
        raise DataError(f"input='{settings.input}' has no rows; give a source with at least one")
    connect(settings.workers.total_cpus + (VLLM_STAGE_CPUS if settings.strategy == "vllm" else 1))
    rows = [piece["rows"] for piece in plan]
    limit = RejectedLimit(None if None in rows else sum(rows), settings.max_rejected_fraction)
    asked = _ask(work, job, plan, progress, limit)
    limit.check()
    units = [{**piece, "failed": result["failed"]} for piece, result in zip(plan, asked, strict=True)]
    folder = work.folder(WRITE)
    written = run_units(work, WRITE, units, WriteCaptions(job, folder, work.tree), progress)
    if not any(result["rows_out"] for result in written):
        raise DataError(f"input='{settings.input}': no row got a caption; the first is {limit.example}")
    return finish(work, _finished(job, asked, written))


def _pieces(source: Source, limit: int | None, scratch: UPath) -> list[dict[str, Any]]:
    """Pieces of the source, with the number of rows to `take` of each; None for all."""
    pieces = []
    left = limit
    for piece in source.pieces(scratch):
        if left is not None and left <= 0:
            break
        rows = piece.rows
        if left is not None:
            rows = sum(1 for _ in islice(source.read(piece), left)) if rows is None else min(rows, left)
        pieces.append({**asdict(piece), "take": None if left is None else rows})
        if left is not None:
            assert rows is not None
            pieces[-1]["rows"] = rows
            left -= rows
    return pieces


def _ask(
    work: Workspace, job: CaptionJob, plan: list[dict[str, Any]], progress: Progress, limit: RejectedLimit
) -> list[dict[str, Any]]:
    """Ask about all rows that have not been asked about; returns the results of all pieces.

    Raises:
        BudgetError: the job has used `max_total_tokens`.
    """
    settings = job.settings
    spend = _spender(work, settings)
    run = partial(run_units, work, ASK, plan, progress=progress, on_result=limit.add)
    if settings.strategy == "endpoint":
        results = run(AskEndpoint(job, spend), workers=settings.workers, units_at_once=PIECES_AT_ONCE)
    elif settings.strategy == "transformers":
        results = run(AskVisionModel(job, spend), workers=settings.workers)
    else:
        from pipelines.data.captions.vllm import CloseJournals, ask_vllm

        finished = finished_results(work.folder(ASK))
        pending = [number for number in range(len(plan)) if number not in finished]
        results = run(CloseJournals(job, *ask_vllm(job, plan, pending, spend)))
    if any(result[STOPPED] for result in results):
        counts = add_counts(result["usage"] for result in results)
        answered = sum(result["rows_out"] for result in results if not result[STOPPED])
        raise BudgetError(
            f"max_total_tokens={settings.max_total_tokens} is reached: {_spent(counts, settings)}; {answered} rows are"
            " in finished pieces, nothing is published yet; all replies are kept: raise max_total_tokens and run the"
            " same command again"
        )
    return results


def _spender(work: Workspace, settings: CaptionSettings) -> Callable[[int], bool]:
    """Counts the tokens of all processes; whether the job has used all that it may."""
    if settings.max_total_tokens is None:
        return _no_limit
    before = [result["usage"] for result in finished_results(work.folder(ASK)).values()]
    budget = ray.remote(num_cpus=0)(Budget).remote(settings.max_total_tokens)
    spend = partial(_spend, budget)
    spend(sum(counts["prompt_tokens"] + counts["completion_tokens"] for counts in before))
    return spend


def _no_limit(tokens: int) -> bool:
    return False


def _spend(budget: Any, tokens: int) -> bool:
    return ray.get(budget.spend.remote(tokens))


def _finished(job: CaptionJob, asked: list[dict[str, Any]], written: list[dict[str, Any]]) -> Finished:
    settings = job.settings
    names = ("rows_in", "rows_out", "rejected", "cut", "retried", "incomplete_prompts")
    counts: dict[str, Any] = {name: sum(result[name] for result in written) for name in names}
    counts |= add_counts(result["usage"] for result in asked)
    seconds = Counter[str]()
    for result in asked:
        seconds.update({name: result.get(name, 0.0) for name in ("waiting_seconds", "flight_seconds")})
    if seconds["waiting_seconds"]:
        counts["requests_in_flight"] = round(seconds["flight_seconds"] / seconds["waiting_seconds"], 2)
    return Finished(
        title="Captions",
        source=settings.input,
        settings=settings,
        facts=[
            ("source", job.source.describe()),
            ("prompt", "\n".join(job.prompt.lines)),
            ("spent", _spent(counts, settings)),
        ],
        counts=counts,
        files=[result["file"] for result in written],
        schema=output_schema(job.source),
        reasons=[reason for result in written for reason in result["reasons"]],
        histograms=[LengthHistogram("Captions", add_counts(result["tokens"] for result in written))],
        stage=WRITE,
        sample=_sample,
    )


def _sample(row: dict[str, Any]) -> Sample:
    short = caption_text(row["short_caption"])
    tokens = count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), [row["caption"]])[0]
    return Sample(row["id"], row["image"], row["caption"], {"short caption": short} if short else {}, tokens)


def _spent(counts: dict[str, Any], settings: CaptionSettings) -> str:
    """Replies, tokens and cost, as the summary line says them."""
    text = f"{counts['replies']} replies, {counts['prompt_tokens']} prompt + {counts['completion_tokens']} reply tokens"
    if counts["without_usage"]:
        text += f" (of {counts['without_usage']} replies the server did not report any)"
    price = settings.price_per_million
    if price.input or price.output:
        cost = (counts["prompt_tokens"] * price.input + counts["completion_tokens"] * price.output) / 1e6
        text += f", cost {cost:.4g}"
    return text


def _treated(counts: dict[str, Any]) -> str:
    """What was done to captions, and how full the pipe to the server was."""
    text = f"{counts['retried']} rows asked again, {counts['cut']} cut at a sentence"
    if counts["incomplete_prompts"]:
        text += f", {counts['incomplete_prompts']} prompts without a column that is empty"
    if "requests_in_flight" in counts:
        text += f"; {counts['requests_in_flight']} requests in flight on average"
    return text
