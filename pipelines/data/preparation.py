"""The job of `prepare.py`: hash the evaluation sets, clean the pieces, remove duplicates, write the output."""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from longclip.errors import DataError
from longclip.text.sentences import caption_text
from pipelines.common.cluster import connect
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.storage import explained, output_path
from pipelines.data.cleaning import KEY, CleanPiece, HashPiece, ImageHashes, staged_schema
from pipelines.data.deduplication import Arrangement, WriteFile, arrange
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Histogram, Sample
from pipelines.data.settings import NOT_IN_IDENTITY, PrepareSettings
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.source import Source
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace, claim, fingerprint


def prepare(settings: PrepareSettings) -> None:
    """Run the job, or what is left of it, and print its summary line.

    Raises:
        ConfigError: the output exists and was made by another job or with other settings.
        DataError: the input cannot be read, or too many of its rows are unusable.
    """
    progress = Progress("prepare")
    output = output_path("output", settings.output, settings.storage)
    source = open_source("input", settings.input, settings.source, settings.storage)
    evaluation_sets = [
        open_source("exclude_overlap_with", value, settings.source, settings.storage)
        for value in settings.exclude_overlap_with
    ]
    print(source.describe(), flush=True)
    inputs = [settings.input, *settings.exclude_overlap_with]
    identity = {
        "job": "prepare",
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY),
        "source": [fingerprint("input", value, settings.storage) for value in inputs],
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        manifest = work.manifest or _make_output(work, settings, source, evaluation_sets, progress)
        status = "already finished, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    left_out = f"left out {counts['duplicates']} duplicates and {counts['overlapping']} rows of evaluation sets"
    splits = ", ".join(f"{rows} {split}" for split, rows in manifest["splits"].items())
    detail = f"{status}{left_out}; {splits}; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def _make_output(
    work: Workspace, settings: PrepareSettings, source: Source, evaluation_sets: list[Source], progress: Progress
) -> dict[str, Any]:
    """Do the remaining work and publish the output; returns its manifest."""
    plan = work.planned("pieces", partial(_pieces, source))
    if not plan:
        raise DataError(f"input='{settings.input}' has no rows; give a source with at least one")
    connect(min_cpus=2)
    overlap = _hash_images(work, settings, evaluation_sets, progress) if evaluation_sets else None
    rows = [piece["rows"] for piece in plan]
    limit = RejectedLimit(None if None in rows else sum(rows), settings.max_rejected_fraction)
    folder = work.folder("clean")
    clean = CleanPiece(source, settings, folder, overlap)
    results = run_units(work, "clean", plan, clean, progress, on_result=limit.add)
    limit.check()
    arrangement = arrange(folder, results, settings.file_megabytes * 2**20, settings.input)
    if not arrangement.files:
        raise DataError(f"input='{settings.input}': all rows are unusable; the first is {limit.example}")
    schema = staged_schema(source)
    schema = schema.remove(schema.get_field_index(KEY))
    written = run_units(work, "write", arrangement.files, WriteFile(folder, work.tree, schema), progress)
    return finish(work, _finished(settings, source, results, arrangement, written, schema))


def _hash_images(
    work: Workspace, settings: PrepareSettings, evaluation_sets: list[Source], progress: Progress
) -> ImageHashes:
    """Hashes of the images of all evaluation sets."""
    results = []
    for number, source in enumerate(evaluation_sets):
        stage = f"overlap-{number}"
        plan = work.planned(stage, partial(_pieces, source))
        task = HashPiece(source, settings.image.max_pixels)
        results += run_units(work, stage, plan, task, progress)
    perceptual = [int(value, 16) for result in results for value in result["phash"]]
    sha256 = {value for result in results for value in result["sha256"]}
    return ImageHashes(sha256, np.array(perceptual, dtype=np.uint64))


def _pieces(source: Source, scratch: UPath) -> list[dict[str, Any]]:
    return [asdict(piece) for piece in source.pieces(scratch)]


def _finished(
    settings: PrepareSettings,
    source: Source,
    results: list[dict[str, Any]],
    arrangement: Arrangement,
    written: list[dict[str, Any]],
    schema: pa.Schema,
) -> Finished:
    counts = {name: sum(result[name] for result in results) for name in ("rows_in", "rejected", "overlapping")}
    counts |= {"duplicates": len(arrangement.duplicates), "rows_out": sum(unit["rows_out"] for unit in written)}
    return Finished(
        title="Prepared data",
        facts=[("source", source.describe())],
        source=settings.input,
        settings=settings,
        counts=counts,
        files=[unit["file"] for unit in written],
        schema=schema,
        reasons=[*(reason for result in results for reason in result["reasons"]), *arrangement.duplicates.grouped],
        rejected=arrangement.duplicates,
        stage="clean",
        histograms=[Histogram("Captions", add_counts(result["tokens"] for result in results))],
        sample=lambda row: Sample(row["id"], row["image"], caption_text(row["caption"]), {}, row["caption_tokens"]),
    )
