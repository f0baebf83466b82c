"""The task that summarizes one piece of a Parquet and writes it as an output file."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from longclip.constants import LONG_CLIP_CONTEXT_LENGTH
from longclip.files import file_sha256
from longclip.text.sentences import caption_text
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.parquet_set import ROWS_PER_GROUP, parquet_writer
from pipelines.common.rejected_rows import Rejected, write_rejected
from pipelines.common.storage import arrow_filesystem, open_path
from pipelines.common.whole_files import make_directory, whole_file
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
        source = open_path("input", unit["file"], self.settings.storage)
        target = self.tree / unit["name"]
        make_directory(target.parent)
        counts = PieceCounts(Rejected(unit["file"]))
        generated = generated_texts(self.generated, number) if "vllm" in self.settings.strategies else []
        with pq.ParquetFile(source.path, filesystem=arrow_filesystem(source)) as file, whole_file(target) as local:
            schema = output_schema(self.settings, file.schema_arrow)
            groups = list(range(unit["first"], unit["first"] + unit["count"]))
            with parquet_writer(local, schema) as output:
                for batch in file.iter_batches(ROWS_PER_GROUP, row_groups=groups):
                    keys = self._keys(batch, f"{unit['name']}:{{}}", counts.rows_in)
                    texts = generated[counts.rows_in : counts.rows_in + batch.num_rows]
                    output.add(self._with_summaries(pa.Table.from_batches([batch]), keys, texts, counts))
                    counts.rows_in += batch.num_rows
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

    def _keys(self, batch: pa.RecordBatch, numbered: str, rows_before: int) -> list[str]:
        """Ids of the rows; `numbered` with the row number where there is no id."""
        name = self.settings.columns.id
        ids = batch.column(name).to_pylist() if name in batch.schema.names else [None] * batch.num_rows
        return [numbered.format(rows_before + row) if key is None else str(key) for row, key in enumerate(ids)]

    def _with_summaries(self, rows: pa.Table, keys: list[str], generated: list[str], counts: "PieceCounts") -> pa.Table:
        columns = self.settings.columns
        captions = [caption_text(cell).strip() for cell in rows[columns.caption].to_pylist()]
        with_text = [row for row, caption in enumerate(captions) if caption]
        for row in sorted(set(range(len(captions))) - set(with_text)):
            counts.rejected.add(keys[row], "summarize", f"column '{columns.caption}' has no text")
        rows, keys, captions = (
            rows.take(pa.array(with_text, pa.int64())),
            [keys[row] for row in with_text],
            [captions[row] for row in with_text],
        )
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
