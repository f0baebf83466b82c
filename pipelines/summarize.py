"""Add a short `summary` to every caption of a Parquet.

Strategies that need no model: first_sentence (as the official code), extractive (the most central sentence), drop_first
(all but the first sentence) and random_sentences (drawn by the row's id). Rows without a caption are quarantined.

    python pipelines/summarize.py --set input=/data/raw --set output=/data/train --set strategy=extractive
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import ray
from pydantic import Field

from longclip.captions import Strategy, summarizer
from longclip.errors import DataError
from longclip.files import whole_directory
from pipelines.entry import Progress, connect, run_entry
from pipelines.records import Columns, check_parquet, start_quarantine, write_quarantine
from pipelines.settings import Settings, load_settings, storage_path


class SummarizeSettings(Settings):
    """Everything that defines the job."""

    input: str
    """Parquet file, directory or URI with captions; all its columns are kept."""
    output: str
    """Local directory of Parquet files; replaced if it exists."""
    strategy: Strategy = "extractive"
    """How a caption becomes a summary."""
    columns: Columns = Columns()
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Share of rows that may lack a caption before the job stops."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry; `argv` is the command line without the program's name."""
    settings = load_settings(SummarizeSettings, __doc__ or "", argv)
    progress = Progress("summarize")
    source = storage_path("input", settings.input)
    output = Path(storage_path("output", settings.output))
    rows = check_parquet("input", source, [settings.columns.id, settings.columns.caption])
    connect(min_cpus=2)
    quarantine = start_quarantine(rows, settings.max_rejected_fraction)
    job = AddSummaries(settings, quarantine)
    dataset = ray.data.read_parquet(source).map_batches(job, batch_size=256, batch_format="pyarrow")
    with whole_directory(output) as aside:
        dataset.write_parquet(str(aside), row_group_size=128)
        written = list(aside.rglob("*.parquet"))
        if not written:
            raise DataError(f"input='{source}': no row has a caption in column '{settings.columns.caption}'")
    reasons = ray.get(quarantine.reasons.remote())
    write_quarantine(reasons, "summarize", output.with_name(output.name + ".quarantine.parquet"))
    progress.summary(rows, rows - len(reasons), len(reasons), f"strategy {settings.strategy}, {output}")


class AddSummaries:
    """Adds `summary` and `summary_source` to batches of rows."""

    def __init__(self, settings: SummarizeSettings, quarantine: object) -> None:
        self.settings, self.quarantine = settings, quarantine

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows that have a caption, with their summaries."""
        columns, strategy = self.settings.columns, self.settings.strategy
        keys = [str(key) for key in table[columns.id].to_pylist()]
        captions = table[columns.caption].to_pylist()
        usable = [isinstance(caption, str) and bool(caption.strip()) for caption in captions]
        rejected = {
            key: f"column '{columns.caption}' holds no text" for key, ok in zip(keys, usable, strict=True) if not ok
        }
        if rejected:
            ray.get(self.quarantine.add.remote(rejected))  # type: ignore[attr-defined]
        summarize = summarizer(strategy)
        summaries = [summarize(caption, key) for key, caption, ok in zip(keys, captions, usable, strict=True) if ok]
        table = table.filter(pa.array(usable))
        for name, values in ((columns.summary, summaries), ("summary_source", [strategy] * len(summaries))):
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(values, pa.string()))
        return table


if __name__ == "__main__":
    run_entry(main)
