"""The journal of a model's replies: one small file per reply, and one per piece when all its rows have theirs.

A reply is paid for when it arrives, so it is stored at once, on local disks and on object storage, which cannot append.
"""

import dataclasses
import json
from collections import defaultdict

from upath import UPath

from pipelines.common.chat_endpoint import Completion
from pipelines.common.whole_files import make_directory, remove, write_whole

Replies = dict[int, list[Completion]]
"""Replies of each row of a piece, in their order."""


class Journal:
    """Replies of one piece."""

    def __init__(self, folder: UPath, number: int) -> None:
        """
        Args:
            folder: directory of all journals of a job.
            number: number of the piece.
        """
        self.folder, self.whole = folder / f"{number:06d}", folder / f"{number:06d}.json"
        make_directory(self.folder)

    def add(self, row: int, attempt: int, reply: Completion) -> None:
        """Store a reply; attempts count from 0."""
        path = self.folder / f"{row:08d}-{attempt:03d}.json"
        write_whole(path, json.dumps(dataclasses.asdict(reply)).encode())

    def read(self) -> Replies:
        """All replies."""
        if self.whole.exists():
            rows = json.loads(self.whole.read_bytes())
            return {int(row): [Completion(**reply) for reply in replies] for row, replies in rows.items()}
        base = self.folder.path.rstrip("/")
        try:
            listed = self.folder.fs.ls(base, detail=False)
        except FileNotFoundError:
            return {}
        # Zero-padded, so their order is that of rows and attempts. Hidden ones are of processes killed while writing.
        names = sorted(name for name in listed if name.endswith(".json") and name.rpartition("/")[2][0] != ".")
        replies: Replies = defaultdict(list)
        texts = self.folder.fs.cat_ranges(names, 0, None, on_error="raise")
        for name, text in zip(names, texts, strict=True):
            replies[int(name.rpartition("/")[2].partition("-")[0])].append(Completion(**json.loads(text)))
        return dict(replies)

    def close(self, replies: Replies) -> None:
        """Replace the small files by one with these replies, which must be all."""
        content = {row: [dataclasses.asdict(reply) for reply in replies[row]] for row in sorted(replies)}
        write_whole(self.whole, json.dumps(content).encode())
        remove(self.folder)
