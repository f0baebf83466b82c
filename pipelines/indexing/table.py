"""The table of an index: all items with their vectors, in Lance, on a local disk or in object storage."""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from longclip.errors import ConfigError, DataError
from longclip.index.filters import filterable
from pipelines.common.storage import Storage, is_local

# Ray and others fork to start programs, but those do not use Lance.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

TABLE = "table.lance"
ID, CONTENT, MODEL = "id", "content_sha256", "checkpoint_id"
RESERVED = (ID, CONTENT, MODEL, "caption", "thumbnail", "image_embedding", "caption_embedding")
States = dict[str, tuple[str, str]]
"""Content and model of each item, by id."""


def table_schema(dim: int, caption_vectors: bool, metadata: Sequence[str], source: pa.Schema) -> pa.Schema:
    """Columns of a table.

    Args:
        dim: length of a vector.
        caption_vectors: whether captions have vectors as well.
        metadata: columns of the source to filter by.
        source: schema of the source.

    Raises:
        DataError: a metadata column is reserved, or of a type that cannot be filtered by.
    """
    vector = pa.list_(pa.float32(), dim)
    fields = [pa.field(name, pa.string()) for name in (ID, CONTENT, MODEL, "caption")]
    fields += [pa.field("thumbnail", pa.binary()), pa.field(vector_column("image"), vector)]
    if caption_vectors:
        fields.append(pa.field(vector_column("caption"), vector))
    for name in metadata:
        kind = source.field(name).type
        if name in RESERVED or not filterable(kind):
            raise DataError(
                f"metadata: column '{name}' ({kind}) cannot be kept; columns of text, numbers and booleans can, except"
                f" {', '.join(RESERVED)}"
            )
        fields.append(pa.field(name, pa.string() if pa.types.is_large_string(kind) else kind))
    return pa.schema(fields)


class IndexTable:
    """A Lance table; one process writes it, holding the lease of the index."""

    def __init__(self, index: UPath, storage: Storage) -> None:
        path = index / TABLE
        self.uri, self.storage = path.path if is_local(path) else str(path), storage
        self.options = _options(path, storage)
        try:
            self._table: lance.LanceDataset | None = lance.dataset(self.uri, storage_options=self.options)
        except ValueError as error:
            if "not found" not in str(error):
                raise
            self._table = None

    @property
    def version(self) -> int:
        """Version number of the table; 0 if there is no table yet."""
        return self._table.version if self._table else 0

    def require(self, schema: pa.Schema) -> None:
        """Check the columns of an existing table.

        Raises:
            ConfigError: its columns or the length of its vectors differ.
        """
        if self._table is None:
            return
        existing = {field.name: field.type for field in self._table.schema}
        wanted = {field.name: field.type for field in schema}
        for name in existing | wanted:
            if existing.get(name) != wanted.get(name):
                raise ConfigError(
                    f"output: column '{name}' of the index is {existing.get(name) or 'missing'}, with these settings it"
                    f" would be {wanted.get(name) or 'missing'}; choose another output, or the settings it has"
                )

    def states(self) -> States:
        """Content and model of every item."""
        if self._table is None:
            return {}
        columns = self._table.to_table(columns=[ID, CONTENT, MODEL]).to_pydict()
        return dict(zip(columns[ID], zip(columns[CONTENT], columns[MODEL], strict=True), strict=True))

    def upsert(self, items: pa.Table) -> None:
        """Insert items, or replace those of the same ids; one commit."""
        if self._table is None:
            self._table = lance.write_dataset(items, self.uri, storage_options=self.options)
            return
        merge = self._table.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
        merge.execute(items)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete items; returns how many were in the table."""
        keys = pa.table({ID: pa.array(ids, pa.string())})
        if self._table is None or not keys.num_rows:
            return 0
        return int(self._table.merge_insert(ID).when_matched_delete().execute(keys)["num_deleted_rows"])

    def tag(self, name: str) -> None:
        """Keep the current version of the table under a name."""
        if self._table is None:
            raise DataError(f"'{self.uri}' has no items")
        self._table.tags.create(name, self._table.version)

    def sorted_rows(self) -> tuple[int, np.ndarray]:
        """Number of items, and their rows in the order of their ids, so that the same items make the same files."""
        ids = self._table.to_table(columns=[ID])[ID].combine_chunks() if self._table else pa.array([], pa.string())
        return len(ids), pc.array_sort_indices(ids).to_numpy().astype(np.int64)

    @property
    def metadata(self) -> dict[str, str]:
        """Types of the columns to filter by."""
        fields = self._table.schema if self._table else []
        return {field.name: str(field.type) for field in fields if field.name not in RESERVED}


def vector_column(target: str) -> str:
    """Name of the column with the vectors of `image` or `caption`."""
    return f"{target}_embedding"


def read_rows(uri: str, options: dict[str, str], version: int, rows: np.ndarray) -> pa.Table:
    """Some rows of a version of a table, in the given order."""
    return lance.dataset(uri, version=version, storage_options=options).take(rows.tolist())


def _options(path: UPath, storage: Storage) -> dict[str, str]:
    """Storage options of Lance, in addition to the `AWS_*` variables that it reads itself."""
    if is_local(path):
        return {}
    # The same as botocore, which reads and writes all other files: other servers than Amazon's get endpoint/bucket.
    by_host = not (storage.path_style or storage.endpoint)
    options: dict[str, Any] = {"aws_virtual_hosted_style_request": str(by_host).lower()}
    if storage.endpoint:
        options |= {"aws_endpoint": storage.endpoint, "allow_http": str(storage.endpoint.startswith("http://")).lower()}
        options["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    if storage.anonymous:
        options["aws_skip_signature"] = "true"
    return options
