"""Which rows have to be embedded. Its tasks run in many processes, so this module does not import torch."""

import hashlib

import numpy as np
import ray

from pipelines.common.columns import Columns
from pipelines.indexing.table import CONTENT, States


class KeepChanges:
    """Drops rows whose content the index has already, from the same model; adds `content_sha256`."""

    def __init__(self, columns: Columns, metadata: list[str], checkpoint_id: str, states: "ray.ObjectRef[States]"):
        self.columns, self.metadata, self.checkpoint_id, self.states = columns, metadata, checkpoint_id, states

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows that are new or changed."""
        states: States = ray.get(self.states)
        digests = [self._digest(batch, row) for row in range(len(batch[self.columns.id]))]
        rows = [
            row
            for row, id in enumerate(batch[self.columns.id])
            if states.get(str(id)) != (digests[row], self.checkpoint_id)
        ]
        return {name: values[rows] for name, values in batch.items()} | {CONTENT: np.array(digests, dtype=object)[rows]}

    def _digest(self, batch: dict[str, np.ndarray], row: int) -> str:
        digest = hashlib.sha256()
        for name in (self.columns.image, self.columns.caption, *self.metadata):
            cell = batch[name][row]
            if isinstance(cell, dict):  # an image column of a Hugging Face data set
                cell = cell.get("bytes")
            if isinstance(cell, np.ndarray | np.generic):
                cell = cell.tolist()
            content = cell if isinstance(cell, bytes) else repr(cell).encode()
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()
