"""The task that summarizes one piece of a Parquet and writes it as an output file."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.errors import ImageError
from longclip.files import file_sha256
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.columns import image_bytes
from pipelines.common.parquet_rows import Damaged, read_rows, unreadable_cells
from pipelines.common.parquet_set import ROWS_PER_GROUP, parquet_writer
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.storage import arrow_filesystem, explained, open_path
from pipelines.common.whole_files import make_directory, whole_file
from pipelines.data.summaries.captions import row_caption
from pipelines.data.summaries.settings import SummarizeSettings
from pipelines.data.summaries.summarizers import Summarizer, checked_summaries, load_summarizer
from pipelines.data.summaries.vllm_stage import generated_texts

SOURCE = "summary_source"
"""Output column with the strategy of each summary."""


class AddSummaries:
    """Writes an output file; each process loads its models once."""

    def __init__(self, settings: SummarizeSettings, folder: UPath, generated: UPath, tree: UPath) -> None:
        """
        Args:
            settings: strategies, columns, and access to the storage of the input.
            folder: directory for rejected rows.
            generated: directory with the texts of strategy vllm, see `pipelines.data.summaries.vllm_stage`.
            tree: directory of the output.
        """
        self.settings, self.folder, self.generated, self.tree = settings, folder, generated, tree
        self._summarizers: dict[str, Summarizer] = {}

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Summarize a piece; see `pipelines.data.work_units.UnitTask`. The result also has `tokens`, of captions and of
        the summaries of each strategy, and `fallbacks` by `strategy: reason`."""
        target = self.tree / unit["name"]
        make_directory(target.parent)
        counts = PieceCounts(Rejected(unit["file"]))
        generated = generated_texts(self.generated, number) if "vllm" in self.settings.strategies else []
        with explained("input", unit["file"]):
            path = open_path("input", unit["file"], self.settings.storage)
            schema = pq.read_schema(path.path, filesystem=arrow_filesystem(path))
        with whole_file(target) as local:
            with parquet_writer(local, output_schema(self.settings, schema)) as output:
                for part in self._read(path, unit):
                    numbered, rows_before = f"{unit['name']}:{{}}", counts.rows_in
                    if isinstance(part, Damaged):
                        counts.rows_in += part.rows
                        for row in range(rows_before, counts.rows_in):
                            counts.rejected.add(numbered.format(row), "read", part.problem)
                        continue
                    counts.rows_in += part.num_rows
                    texts = generated[rows_before : counts.rows_in]
                    output.add(self._with_summaries(part, numbered, rows_before, texts, counts))
            line = {"name": unit["name"], "rows": output.rows, "bytes": local.stat().st_size}
            line["sha256"] = file_sha256(local)
        write_rejected(counts.rejected, self.folder, number)
        return {
            "rows_in": counts.rows_in,
            "rows_out": output.rows,
            "rejected": len(counts.rejected),
            "first_rejected": counts.rejected.first,
            "reasons": counts.rejected.grouped,
            "file": line,
            "tokens": counts.tokens,
            "fallbacks": counts.fallbacks,
        }

    def _read(self, path: UPath, unit: dict[str, Any]) -> Iterator[pa.RecordBatch | Damaged]:
        """The rows of a piece; storage that fails while they are read is an error of the input, not of the output."""
        with explained("input", path):
            yield from read_rows(path, unit["first"], unit["rows"], ROWS_PER_GROUP)

    def _with_summaries(
        self, batch: pa.RecordBatch, numbered: str, rows_before: int, generated: list[str], counts: "PieceCounts"
    ) -> pa.Table:
        """Rows with their summaries, without those that are rejected.

        Args:
            batch: rows of the input.
            numbered: format of the id of a row without one, by its number in the piece.
            rows_before: rows of the piece before the batch.
            generated: texts of strategy vllm for these rows.
            counts: receives the counts and the rejected rows.
        """
        columns = self.settings.columns
        unreadable = unreadable_cells(batch)
        captions, keys, with_text = [], [], []
        for row, cell in enumerate(batch[columns.caption]):
            reasons = unreadable.get(row, {})
            caption, problem = ("", None) if columns.caption in reasons else row_caption(cell.as_py())
            key = numbered.format(rows_before + row)
            if columns.id in batch.schema.names and columns.id not in reasons:
                value = batch[columns.id][row].as_py()
                key = key if value is None else str(value)
            if reasons or not caption:
                reason = next(iter(reasons.values()), problem or f"column '{columns.caption}' has no text")
                counts.rejected.add(key, "summarize", reason, caption, _image(batch, columns.image, row))
                continue
            captions.append(caption)
            keys.append(key)
            with_text.append(row)
        rows = pa.Table.from_batches([batch])
        if len(with_text) < batch.num_rows:  # Arrow cannot `take` the rows of every type, such as views
            rows = pa.concat_tables([rows.slice(0, 0), *(rows.slice(row, 1) for row in with_text)])
        counts.add_tokens("caption", captions)
        summaries, sources = [], []
        for strategy in self.settings.strategies:
            raw = (
                [generated[row] for row in with_text]
                if strategy == "vllm"
                else self._summarize(strategy, captions, keys)
            )
            texts, made_by, fallbacks = checked_summaries(strategy, raw, captions, self.settings.checks)
            summaries.append(texts)
            sources.append(made_by)
            counts.fallbacks.update(fallbacks)
            counts.add_tokens(strategy, texts)
        schema = output_schema(self.settings, rows.schema)
        for name, by_strategy in ((columns.summary, summaries), (SOURCE, sources)):
            if name in rows.column_names:
                rows = rows.drop_columns([name])
            cells = list(zip(*by_strategy, strict=True)) if self.settings.several else by_strategy[0]
            rows = rows.append_column(name, pa.array(cells, schema.field(name).type))
        return rows.cast(schema)

    def _summarize(self, strategy: str, captions: list[str], keys: list[str]) -> list[str]:
        if strategy not in self._summarizers:
            self._summarizers[strategy] = load_summarizer(strategy, self.settings)
        return self._summarizers[strategy](captions, keys) if captions else []


def _image(batch: pa.RecordBatch, column: str, row: int) -> bytes:
    """Image of a row, for a sample in the report; empty if it has none."""
    try:
        return image_bytes(batch[column][row].as_py())
    except (KeyError, ValueError, ImageError):
        return b""


def output_schema(settings: SummarizeSettings, schema: pa.Schema) -> pa.Schema:
    """Schema of the output for the schema of an input: summaries are texts, or lists for several strategies."""
    text = pa.list_(pa.string()) if settings.several else pa.string()
    for name in (settings.columns.summary, SOURCE):
        index = schema.get_field_index(name)
        schema = (schema.remove(index) if index >= 0 else schema).append(pa.field(name, text))
    return schema.remove_metadata()


@dataclass
class PieceCounts:
    """Counts of a piece."""

    rejected: Rejected
    rows_in: int = 0
    tokens: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Number of texts by length in CLIP tokens, for `caption` and each strategy."""
    fallbacks: Counter[str] = field(default_factory=Counter)

    def add_tokens(self, name: str, texts: list[str]) -> None:
        """Count the lengths of some texts."""
        if texts:
            self.tokens[name].update(count_tokens(load_tokenizer(None, LONG_CLIP_CONTEXT_LENGTH), texts))
