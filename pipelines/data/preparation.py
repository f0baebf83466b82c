"""The job of `prepare.py`: hash the evaluation sets, clean the pieces, remove duplicates, write the output."""

from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from longclip.errors import DataError
from longclip.text.sentences import caption_text
from pipelines.common.cluster import connect
from pipelines.common.progress import Progress
from pipelines.common.rejected_rows import RejectedLimit
from pipelines.common.storage import explained, open_path, output_path
from pipelines.data.cleaning import CleanPiece, staged_schema
from pipelines.data.decontamination import hash_images, set_field
from pipelines.data.deduplication import Arrangement, WriteFile, arrange
from pipelines.data.histograms import LengthHistogram
from pipelines.data.publishing import Finished, add_counts, finish
from pipelines.data.report import Sample
from pipelines.data.settings import KEY, NOT_IN_IDENTITY, PrepareSettings
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.source import Source, planned_pieces
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
    evaluation_sets = {
        name: open_source(
            set_field(name), evaluation.input, evaluation.source, settings.storage, captions_required=False
        )
        for name, evaluation in settings.exclude_overlap_with.items()
    }
    print(source.describe(), flush=True)
    inputs = {"input": settings.input}
    inputs |= {set_field(name): evaluation.input for name, evaluation in settings.exclude_overlap_with.items()}
    identity = {
        "job": "prepare",
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY),
        "source": [fingerprint(field, value, settings.storage) for field, value in inputs.items()],
    }
    with explained("output", settings.output), claim(output, identity, settings.overwrite) as work:
        manifest = work.manifest or _make_output(work, settings, source, evaluation_sets, progress)
        status = "already finished, nothing to do; " if work.manifest else ""
    counts = manifest["counts"]
    by_set = "".join(f", {name} {count}" for name, count in manifest["overlapping"].items()).removeprefix(", ")
    left_out = f"left out {counts['duplicates']} duplicates and {counts['overlapping']} rows of evaluation sets"
    left_out += f" ({by_set})" if by_set else ""
    if manifest["new_ids"]:
        left_out += f"; {manifest['new_ids']} ids that another row has were made unique"
    splits = ", ".join(f"{rows} {split}" for split, rows in manifest["splits"].items())
    detail = f"{status}{left_out}; {splits}; {output}"
    progress.summary(counts["rows_in"], counts["rows_out"], counts["rejected"], detail)


def _make_output(
    work: Workspace,
    settings: PrepareSettings,
    source: Source,
    evaluation_sets: Mapping[str, Source],
    progress: Progress,
) -> dict[str, Any]:
    """Do the remaining work and publish the output; returns its manifest."""
    plan = work.planned("pieces", partial(planned_pieces, source, "input", settings.input))
    if not plan:
        raise DataError(f"input='{settings.input}' has no rows; give a source with at least one")
    connect(min_cpus=2)
    overlap = hash_images(work, settings, evaluation_sets, progress)
    rows = [piece["rows"] for piece in plan]
    limit = RejectedLimit(None if None in rows else sum(rows), settings.max_rejected_fraction)
    folder = work.folder("clean")
    clean = CleanPiece(source, settings, folder, overlap)
    results = run_units(work, "clean", plan, clean, progress, on_result=limit.add)
    limit.check()
    root = str(open_path("input", settings.input, settings.storage)).rstrip("/")
    names = [_file_name(piece["file"], root) for piece in plan]
    arrangement = arrange(folder, results, settings.file_megabytes * 2**20, settings.input, names)
    if not arrangement.files:
        rows_in = sum(result["rows_in"] for result in results)
        overlapping = add_counts(result["overlapping"] for result in results)
        causes = [f"{limit.rejected} are unusable, the first {limit.example}"] if limit.rejected else []
        causes += [f"{count} are in evaluation set '{name}'" for name, count in overlapping.items()]
        raise DataError(f"input='{settings.input}': none of {rows_in} rows is left: {' and '.join(causes)}")
    schema = staged_schema(source)
    schema = schema.remove(schema.get_field_index(KEY))
    written = run_units(work, "write", arrangement.files, WriteFile(folder, work.tree, schema), progress)
    return finish(work, _finished(settings, source, list(evaluation_sets), results, arrangement, written, schema))


def _file_name(file: str, root: str) -> str:
    """Name of a file of the input without its suffix: below the root, or that of the root if it lists the images."""
    name = file.removeprefix(f"{root}/") if file.startswith(f"{root}/") else PurePosixPath(root).name
    return str(PurePosixPath(name).with_suffix(""))


def _finished(
    settings: PrepareSettings,
    source: Source,
    evaluation_sets: list[str],
    results: list[dict[str, Any]],
    arrangement: Arrangement,
    written: list[dict[str, Any]],
    schema: pa.Schema,
) -> Finished:
    by_set = {name: sum(result["overlapping"].get(name, 0) for result in results) for name in evaluation_sets}
    counts = {
        "rows_in": sum(result["rows_in"] for result in results),
        "rejected": sum(result["rejected"] for result in results),
        "overlapping": sum(by_set.values()),
        "duplicates": len(arrangement.duplicates),
        "rows_out": sum(unit["rows_out"] for unit in written),
    }
    return Finished(
        title="Prepared data",
        facts=[
            ("source", source.describe()),
            *((f"in evaluation set {name}", f"{count:,}") for name, count in by_set.items()),
            ("ids made unique", f"{arrangement.renamed:,}"),
        ],
        details={"overlapping": by_set, "new_ids": arrangement.renamed},
        source=settings.input,
        settings=settings,
        counts=counts,
        files=[unit["file"] for unit in written],
        schema=schema,
        reasons=[*(reason for result in results for reason in result["reasons"]), *arrangement.duplicates.grouped],
        rejected=arrangement.duplicates,
        stage="clean",
        histograms=[LengthHistogram("Captions", add_counts(result["tokens"] for result in results))],
        sample=lambda row: Sample(row["id"], row["image"], caption_text(row["caption"]), {}, row["caption_tokens"]),
    )
