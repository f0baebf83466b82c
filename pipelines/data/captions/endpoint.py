"""Captions by a server with OpenAI-compatible chat completions.

Several pieces are worked on at the same time and share the slots for requests, so that the slow last replies of one
piece do not leave slots unused.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from longclip.errors import ConfigError
from pipelines.common.chat_endpoint import MIN_FAILURES, ChatEndpoint, Completion, ReplyError, RequestError
from pipelines.data.captions.drafts import Ask, Draft
from pipelines.data.captions.piece import CaptionJob, PieceWork
from pipelines.data.captions.spending import FlightMeter, usage
from pipelines.data.sources.source import SourceRow

PIECES_AT_ONCE = 4
_START = threading.Lock()


class AskEndpoint:
    """Asks a server about the rows of pieces. Each process has its own connections and slots."""

    def __init__(self, job: CaptionJob, spend: Callable[[int], bool]) -> None:
        """
        Args:
            job: what is asked.
            spend: counts tokens; whether the job has used all that it may.
        """
        self.job, self.spend = job, spend
        self._slots: _Slots | None = None

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Ask about all rows of a piece; see `pipelines.data.work_units.UnitTask` and `PieceWork.result`.

        Raises:
            ConfigError: the server rejects the key, the address or the model, or many requests in a row fail.
        """
        with _START:
            if self._slots is None:
                self._slots = _Slots(self.job)
        slots = self._slots
        work = PieceWork(self.job, number, unit)
        if self.spend(work.tokens_before):
            slots.stop.set()
        futures: list[Future[None]] = []
        slots.meter.change(waiting=1)
        try:
            for row_number, row in work.unanswered():
                if slots.stop.is_set():
                    work.stopped = True
                    break
                slots.room.acquire()
                slots.meter.change(waiting=1)
                futures.append(slots.threads.submit(self._caption, slots, work, row_number, row))
        finally:
            slots.meter.change(waiting=-1)
            wait(futures)
        for future in futures:
            future.result()
        if work.unreached and not work.answered:  # too few rows to have stopped before
            raise slots.at_fault(len(work.unreached), work.unreached[-1])
        return work.result() | slots.meter.take()

    def _caption(self, slots: "_Slots", work: PieceWork, number: int, row: SourceRow) -> None:
        """Ask about a row until it has a caption or has failed."""
        waiting = True
        try:
            draft = work.draft(number, row)
            requests = 0
            while draft and isinstance(draft.step, Ask):
                with slots.requests:
                    if slots.stop.is_set():
                        work.stopped = True
                        return
                    slots.meter.change(in_flight=1, waiting=-waiting)
                    waiting = False
                    try:
                        reply = slots.reply(draft)
                    except ReplyError as error:
                        requests += 1
                        if requests >= self.job.settings.checks.attempts:
                            work.give_up(number, str(error))
                            return
                        continue
                    except RequestError as error:
                        work.give_up(number, str(error))
                        return
                    finally:
                        slots.meter.change(in_flight=-1)
                work.answer(draft, reply)
                self._count(slots, reply)
        except BaseException:
            slots.stop.set()  # the job will end: ask nothing more
            raise
        finally:
            slots.meter.change(waiting=-waiting)
            slots.room.release()

    def _count(self, slots: "_Slots", reply: Completion) -> None:
        counts = usage([reply])
        limit = self.job.settings.max_total_tokens
        if counts["without_usage"] and limit is not None:
            raise ConfigError(
                f"endpoint.url='{self.job.settings.endpoint.url}' does not report the tokens of a reply, so that"
                f" max_total_tokens={limit} cannot be kept; remove it, or use `limit` for a limit on rows"
            )
        if self.spend(counts["prompt_tokens"] + counts["completion_tokens"]):
            slots.stop.set()


class _Slots:
    """What the pieces of a process share."""

    def __init__(self, job: CaptionJob) -> None:
        settings = job.settings.endpoint
        self.endpoint = ChatEndpoint(settings, settings.max_new_tokens)
        # More threads than requests: they prepare images and store replies while others wait for the server.
        threads = settings.concurrency + max(2, settings.concurrency // 2)
        self.threads = ThreadPoolExecutor(threads)
        self.room = threading.BoundedSemaphore(threads)
        self.requests = threading.BoundedSemaphore(settings.concurrency)
        self.stop = threading.Event()
        self.meter = FlightMeter()
        self._max_failures = max(MIN_FAILURES, settings.concurrency)
        self._failures = 0
        self._lock = threading.Lock()

    def reply(self, draft: Draft) -> Completion:
        """The reply of the server; raises `RequestError`, or `ConfigError` if the server is at fault."""
        try:
            reply = self.endpoint.complete(draft.messages())
        except RequestError as error:
            with self._lock:
                self._failures += 1
                failures = self._failures
            if failures >= self._max_failures:
                raise self.at_fault(failures, str(error)) from error
            raise
        with self._lock:
            self._failures = 0
        return reply

    def at_fault(self, failures: int, reason: str) -> ConfigError:
        """The error for a server that answers nothing."""
        return ConfigError(
            f"endpoint.url='{self.endpoint.settings.url}': {failures} requests in a row failed, the last with:"
            f" {reason}; check endpoint.url, endpoint.model and endpoint.options, and that the server is running;"
            " replies are kept, and the same command continues"
        )
