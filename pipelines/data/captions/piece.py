"""The rows of one piece of a source on their way to captions."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from upath import UPath

from longclip.errors import DataError
from pipelines.common.chat_endpoint import Completion
from pipelines.data.captions.drafts import Ask, Draft, Failed, draft_of, next_step
from pipelines.data.captions.journal import Journal, Replies
from pipelines.data.captions.prompting import Prompt
from pipelines.data.captions.settings import CaptionSettings
from pipelines.data.captions.spending import total_tokens, usage
from pipelines.data.sources.source import Piece, Source, SourceRow
from pipelines.data.sources.text_decoding import is_unicode

STOPPED = "stopped"
"""Key of the result of a unit that is not finished, because the job has used all its tokens."""


@dataclass
class CaptionJob:
    """What all tasks of a job know."""

    source: Source
    settings: CaptionSettings
    prompt: Prompt
    journals: UPath
    """Directory of the journals."""

    def rows(self, unit: dict[str, Any]) -> Iterator[tuple[int, SourceRow]]:
        """Numbers and rows of a piece."""
        piece = Piece(**{name: value for name, value in unit.items() if name not in ("take", "failed")})
        return enumerate(islice(self.source.read(piece), unit["take"]))


@dataclass
class PieceWork:
    """The state of a piece: replies, and rows that failed. Several threads may work on it."""

    job: CaptionJob
    number: int
    unit: dict[str, Any]
    rows: int = 0
    ids: dict[int, str] = field(default_factory=dict)
    """Ids by row."""
    failed: dict[int, str] = field(default_factory=dict)
    """Reasons by row."""
    unreached: list[str] = field(default_factory=list)
    """Reasons for which the model gave no reply."""
    answered: int = 0
    """Replies of this run."""
    stopped: bool = False
    """Whether rows were not asked for because the job has used all its tokens."""

    def __post_init__(self) -> None:
        self.journal = Journal(self.job.journals, self.number)
        self.replies: Replies = self.journal.read()
        self.tokens_before = total_tokens(reply for replies in self.replies.values() for reply in replies)
        self._lock = threading.Lock()

    def unanswered(self) -> Iterator[tuple[int, SourceRow]]:
        """Rows that the model has to be asked about, read one after another."""
        checks = self.job.settings.checks
        for number, row in self.job.rows(self.unit):
            self.rows += 1
            self.ids[number] = row.id
            if problem := row.problem or _text_problem(row):
                self.fail(number, problem)
                continue
            step = next_step(self.replies.get(number, []), checks)
            if isinstance(step, Ask):
                yield number, row
            elif isinstance(step, Failed):
                self.fail(number, step.reason)

    def draft(self, number: int, row: SourceRow) -> Draft | None:
        """The draft of a row; None if its image cannot be used."""
        settings = self.job.settings
        try:
            return draft_of(number, row, self.replies.get(number, []), self.job.prompt, settings.image, settings.checks)
        except DataError as error:
            self.fail(number, str(error))
            return None

    def answer(self, draft: Draft, reply: Completion) -> None:
        """Store a reply, and take it into account."""
        self.journal.add(draft.row, len(draft.replies), reply)
        draft.add(reply, self.job.settings.checks)
        with self._lock:
            self.answered += 1
            self.replies[draft.row] = draft.replies
        if isinstance(draft.step, Failed):
            self.fail(draft.row, draft.step.reason)

    def fail(self, number: int, reason: str) -> None:
        """Record that a row gets no caption."""
        with self._lock:
            self.failed[number] = reason

    def give_up(self, number: int, reason: str) -> None:
        """Record that the model gave no reply for a row."""
        self.unreached.append(reason)
        self.fail(number, reason)

    def result(self) -> dict[str, Any]:
        """The result of the unit; the journal is closed if it is finished."""
        if not self.stopped:
            self.journal.close(self.replies)
        first = min(self.failed, default=None)
        return {
            "rows_in": self.rows,
            "rows_out": self.rows - len(self.failed),
            "rejected": len(self.failed),
            "first_rejected": "" if first is None else f"'{self.ids[first]}': {self.failed[first]}",
            "failed": {str(row): reason for row, reason in sorted(self.failed.items())},
            "usage": usage(reply for replies in self.replies.values() for reply in replies),
            STOPPED: self.stopped,
        }


def _text_problem(row: SourceRow) -> str | None:
    """Why the texts of a row cannot be written to Parquet, if they cannot."""
    texts = {"id": [row.id], "caption": row.captions} | {name: [value] for name, value in row.extra.items()}
    for name, values in texts.items():
        for value in values:
            if isinstance(value, str) and not is_unicode(value):
                return f"{name} is not valid Unicode"
    return None
