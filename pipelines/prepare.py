"""Make clean training Parquet of what you have: decode, check, hash, deduplicate, split.

Sources: Parquet (images as bytes, Hugging Face structs, paths or URIs), WebDataset tars and img2dataset output,
ShareGPT4V, DOCCI, IIW, COCO and Flickr30k annotations, Urban1k, any folder of images with .txt files beside them;
local, s3:// or any other fsspec URI. Rows that cannot be used are kept apart with a reason. A job that was killed is
finished by the same command.

    python pipelines/prepare.py --set input=/data/sharegpt4v.json --set source.images=/data --set output=/data/clean
    python pipelines/prepare.py --set input=s3://bucket/raw --set output=s3://bucket/clean --set val_fraction=0.01 \\
        --set image.short_side=288 --set exclude_overlap_with=/data/urban1k

Out: <output>/train/*.parquet, <output>/val/*.parquet, _manifest.json, _quarantine.parquet and _report.html.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, PositiveInt
from upath import UPath

from longclip.errors import DataError
from longclip.text.sentences import caption_text
from pipelines.common.entry import Progress, connect, run_entry
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.settings import load_settings
from pipelines.common.storage import Storage, explained, output_path
from pipelines.data.cleaning import KEY, CleanPiece, CleanSettings, HashPiece, ImageHashes, staged_schema
from pipelines.data.deduplication import Arrangement, WriteFile, arrange
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Histogram, Sample
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source
from pipelines.data.work_units import run_units
from pipelines.data.workspace import Workspace, claim, fingerprint


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class PrepareSettings(CleanSettings):
    """Everything that defines the job."""

    input: str
    """What you have: a file, a directory or a URI; see source.format for the layouts."""
    output: str
    """Directory or URI of the clean set."""
    source: SourceSettings = SourceSettings()
    exclude_overlap_with: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=[])
    """Evaluation sets, in any of the layouts: images that stand in one of them are left out."""
    file_megabytes: PositiveInt = 256
    """Target size of an output file."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """Share of rows that may be unusable before the job fails. Duplicates and overlaps do not count."""
    overwrite: bool = False
    """Replace a finished output, or unfinished work, of other settings or data."""
    storage: Storage = Storage()


NOT_OF_THE_OUTPUT = {"output", "storage", "overwrite", "max_rejected_fraction"}
"""Settings that say how the job runs, not what comes out: a run that stopped is finished with others."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(PrepareSettings, __doc__ or "", argv)
    progress = Progress("prepare")
    output = output_path("output", settings.output, settings.storage)
    source = open_source("input", settings.input, settings.source, settings.storage)
    evaluation = [
        open_source("exclude_overlap_with", value, settings.source, settings.storage)
        for value in settings.exclude_overlap_with
    ]
    print(source.describe(), flush=True)
    values = [settings.input, *settings.exclude_overlap_with]
    identity = {
        "job": "prepare",
        "settings": settings.model_dump(mode="json", exclude=NOT_OF_THE_OUTPUT),
        "source": [fingerprint("input", value, settings.storage) for value in values],
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        manifest = work.manifest or prepare(work, settings, source, evaluation, progress)
        done = "was finished before, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    left_out = f"{counts['duplicates']} duplicates and {counts['overlapping']} of evaluation sets left out"
    splits = ", ".join(f"{rows} {split}" for split, rows in manifest["splits"].items())
    detail = f"{done}{left_out}; {splits}; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def prepare(
    work: Workspace, settings: PrepareSettings, source: Source, evaluation: list[Source], progress: Progress
) -> dict[str, Any]:
    """Do what is left of the job, and publish its output; gives the manifest."""
    plan = work.planned("pieces", partial(_pieces, source))
    if not plan:
        raise DataError(f"input='{settings.input}' has no rows; give a source with at least one")
    connect(min_cpus=2)
    overlap = hash_evaluation(work, settings, evaluation, progress) if evaluation else None
    rows = [piece["rows"] for piece in plan]
    limit = RejectedLimit(None if None in rows else sum(rows), settings.max_rejected_fraction)
    folder = work.folder("clean")
    clean = CleanPiece(source, settings, folder, overlap)
    results = run_units(work, "clean", plan, clean, progress, on_result=limit.add)
    limit.check()
    arrangement = arrange(folder, results, settings.file_megabytes * 2**20, settings.input)
    if not arrangement.files:
        raise DataError(f"input='{settings.input}': none of its rows can be used; the first is {limit.example}")
    schema = staged_schema(source)
    schema = schema.remove(schema.get_field_index(KEY))
    written = run_units(work, "write", arrangement.files, WriteFile(folder, work.tree, schema), progress)
    return finish(work, _finished(settings, source, results, arrangement, written, schema))


def hash_evaluation(
    work: Workspace, settings: PrepareSettings, evaluation: list[Source], progress: Progress
) -> ImageHashes:
    """Hashes of the images of all evaluation sets."""
    results = []
    for number, source in enumerate(evaluation):
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


if __name__ == "__main__":
    run_entry(main)
