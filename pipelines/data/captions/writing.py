"""The task that writes the captioned rows of a piece, when the model has been asked about all of them."""

from collections import Counter
from typing import Any

import pyarrow as pa
from upath import UPath

from longclip.files import file_sha256
from longclip.text.sentences import caption_text
from pipelines.common.parquet_set import parquet_writer
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.whole_files import whole_file
from pipelines.data.captions.drafts import Accepted, next_step, prompt_values
from pipelines.data.captions.journal import Journal
from pipelines.data.captions.piece import CaptionJob
from pipelines.data.captions.settings import COLUMNS
from pipelines.data.sources.source import Source, SourceRow

BATCH_ROWS = 32


class WriteCaptions:
    """Writes an output file: the images of a piece with the captions in its journal."""

    def __init__(self, job: CaptionJob, folder: UPath, tree: UPath) -> None:
        """
        Args:
            job: source, settings and journals.
            folder: directory for rejected rows.
            tree: directory of the output.
        """
        self.job, self.folder, self.tree = job, folder, tree
        self.schema = output_schema(job.source)
        self.made_by = f"{job.settings.model}#{job.prompt.digest[:8]}"

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Write a piece; see `pipelines.data.work_units.UnitTask`. The unit has the reasons of `failed` rows. The
        result also has the `file`, grouped `reasons`, caption `tokens`, and numbers of captions that were `cut`, that
        took several replies (`retried`), and whose prompt lacked a column (`incomplete_prompts`)."""
        replies = Journal(self.job.journals, number).read()
        failed = {int(row): reason for row, reason in unit["failed"].items()}
        rejected = Rejected(unit["listed"] or unit["file"])
        tokens, counts = Counter[int](), Counter[str]()
        name = f"part-{number:05d}.parquet"
        with whole_file(self.tree / name) as local:
            with parquet_writer(local, self.schema) as output:
                batch: list[dict[str, Any]] = []
                for row_number, row in self.job.rows(unit):
                    counts["rows_in"] += 1
                    step = next_step(replies.get(row_number, []), self.job.settings.checks)
                    if row_number in failed or not isinstance(step, Accepted):
                        stage = "read" if row.problem else "caption"
                        rejected.add(row.id, stage, failed.get(row_number, "the model gave no reply"))
                        continue
                    tokens[step.verdict.tokens] += 1
                    counts["cut"] += step.verdict.cut
                    counts["retried"] += step.attempts > 1
                    counts["incomplete_prompts"] += self.job.prompt.lacks(prompt_values(row))
                    batch.append(self._columns(row, step.verdict.caption))
                    if len(batch) == BATCH_ROWS:
                        output.add(pa.RecordBatch.from_pylist(batch, self.schema))
                        batch = []
                if batch:
                    output.add(pa.RecordBatch.from_pylist(batch, self.schema))
            file = {"name": name, "rows": output.rows, "bytes": local.stat().st_size, "sha256": file_sha256(local)}
        write_rejected(rejected, self.folder, number)
        return {
            "rows_in": counts["rows_in"],
            "rows_out": output.rows,
            "rejected": len(rejected),
            "first_rejected": rejected.first,
            "reasons": rejected.grouped,
            "file": file,
            "tokens": dict(tokens),
            **{name: counts[name] for name in ("cut", "retried", "incomplete_prompts")},
        }

    def _columns(self, row: SourceRow, caption: str) -> dict[str, Any]:
        before = [text for text in row.captions if text.strip()]
        short = before if self.job.source.lists else caption_text(before)
        columns = dict(zip(COLUMNS, (row.id, row.image, caption, short or None, self.made_by), strict=True))
        return {**row.extra, **columns}


def output_schema(source: Source) -> pa.Schema:
    """Schema of the output."""
    text = pa.list_(pa.string()) if source.lists else pa.string()
    types = dict(zip(COLUMNS, (pa.string(), pa.binary(), pa.string(), text, pa.string()), strict=True))
    return pa.schema([*types.items(), *source.extra])
