"""Asking a server about pieces: slots, journals, servers that fail, and the limit on tokens. No Ray is needed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from longclip.errors import ConfigError
from pipelines.common.chat_endpoint import Completion
from pipelines.common.storage import Storage
from pipelines.data.captions.endpoint import AskEndpoint
from pipelines.data.captions.journal import Journal
from pipelines.data.captions.piece import CaptionJob, PieceWork
from pipelines.data.captions.prompting import load_prompt
from pipelines.data.captions.settings import CaptionSettings
from pipelines.data.captions.spending import Budget
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.source import Piece, Source, SourceRow
from tests.support.broken_rows import jpeg
from tests.support.caption_server import CaptionServer

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(caption_server: CaptionServer, tmp_path: Path) -> Ask:
    """Ask about a piece of as many rows as there are notes."""

    def asked(*notes: str | None, spend: Callable[[int], bool] = lambda tokens: False, **values: Any) -> dict[str, Any]:
        source, prompt = tmp_path / "x.parquet", tmp_path / "prompt.txt"
        images = [jpeg(number) for number in range(len(notes))]
        pq.write_table(pa.table({"image": images, "text": pa.array(notes, pa.string())}), source)
        prompt.write_text("{caption}")
        endpoint = {"url": caption_server.url, "model": "eyes", **values.pop("endpoint", {})}
        settings = CaptionSettings.model_validate(
            {"input": str(source), "output": "y", "endpoint": endpoint, "prompt": str(prompt), **values}
        )
        opened = open_source("input", str(source), settings.source, Storage(), captions_required=False)
        job = CaptionJob(opened, settings, load_prompt(settings), UPath(tmp_path / "journals"))
        unit = {"file": str(source), "first": 0, "rows": len(notes), "take": None}
        return AskEndpoint(job, spend)(0, unit)

    return asked


def test_the_stated_number_of_requests_is_in_flight(ask: Ask, caption_server: CaptionServer) -> None:
    caption_server.seconds = 0.05
    result = ask(*["fine"] * 40, endpoint={"concurrency": 5})
    assert caption_server.max_active == 5
    assert result["rows_out"] == 40


def test_a_server_that_fails_ends_the_job_and_nothing_is_lost(ask: Ask, caption_server: CaptionServer) -> None:
    ask("fine", "fine")
    asked = len(caption_server.requests)
    for status, rows, expected in (
        (500, 30, "8 requests in a row failed, the last with: 500 .* the same command continues"),
        (500, 3, "1 requests in a row failed"),
        (401, 30, "rejects model 'eyes': 401 .*; check .* the key in LONGCLIP_LLM_API_KEY"),
    ):
        caption_server.status = status
        with pytest.raises(ConfigError, match=expected):
            ask(*["fine"] * rows, endpoint={"concurrency": 1, "attempts": 1}, checks={"attempts": 2 + (rows == 3)})
    assert len(caption_server.requests) < asked + 40, "it must not send all"


def test_some_failed_requests_are_failed_rows(ask: Ask, caption_server: CaptionServer) -> None:
    result = ask("fine", "rejected", "nonsense", None, "busy", endpoint={"concurrency": 1})
    assert result["rows_out"] == 2
    assert "400 Bad Request" in result["failed"]["1"]
    assert "not a chat completion" in result["failed"]["2"]
    assert result["failed"]["3"] == "the columns of the prompt (caption) are empty"
    assert sorted(caption_server.images.values()) == [1, 1, 3, 3]


def test_the_limit_on_tokens_stops_between_requests(ask: Ask, caption_server: CaptionServer, tmp_path: Path) -> None:
    budget = Budget(700)
    result = ask(*["fine"] * 20, spend=budget.spend, endpoint={"concurrency": 2}, max_total_tokens=700)
    assert result["stopped"]
    assert 700 <= budget.used < 700 + 3 * 300
    asked = len(caption_server.requests)
    assert sum(map(len, Journal(UPath(tmp_path / "journals"), 0).read().values())) == asked, "all replies are kept"
    again = Budget(700)
    assert ask(*["fine"] * 20, spend=again.spend, max_total_tokens=700)["stopped"]
    assert (again.used, len(caption_server.requests)) == (budget.used, asked), "earlier runs count"
    assert ask(*["fine"] * 20)["usage"]["replies"] == 20 == len(caption_server.requests)
    caption_server.usage = False
    with pytest.raises(ConfigError, match="does not report the tokens of a reply, so that max_total_tokens=900"):
        ask(*["short"] * 21, max_total_tokens=900)


def test_a_closed_journal_answers_everything(ask: Ask, caption_server: CaptionServer) -> None:
    results = [ask("fine", "refused once", "short", None) for _ in range(2)]
    assert results[0]["failed"] == results[1]["failed"]
    assert results[0]["usage"] == results[1]["usage"]
    assert results[0]["usage"]["replies"] == len(caption_server.requests) == 1 + 2 + 3


def test_texts_that_cannot_be_written_cost_nothing(tmp_path: Path) -> None:
    class Rows:
        def read(self, piece: Piece) -> Iterator[SourceRow]:
            yield SourceRow("half \ud83d", jpeg(1))
            yield SourceRow("a", jpeg(1), ["half \ud83d"])
            yield SourceRow("b", jpeg(1), extra={"place": "half \ud83d", "year": 7})
            yield SourceRow("c", jpeg(1), ["A dog."], extra={"place": "home", "year": None})

    endpoint = {"url": "http://server/v1", "model": "eyes"}
    settings = CaptionSettings.model_validate({"input": "x", "output": "y", "endpoint": endpoint})
    job = CaptionJob(cast(Source, Rows()), settings, load_prompt(settings), UPath(tmp_path))
    work = PieceWork(job, 0, {"file": "x", "take": None})
    assert [number for number, _ in work.unanswered()] == [3]
    assert work.failed == {n: f"{name} is not valid Unicode" for n, name in enumerate(("id", "caption", "place"))}


def test_journal_of_killed_and_finished_pieces(tmp_path: Path) -> None:
    replies = {3: [Completion("a", "stop", 1, 2), Completion("b \ud83d")], 11: [Completion("c")]}
    journal = Journal(UPath(tmp_path), 5)
    for row, texts in replies.items():
        for attempt, reply in enumerate(texts):
            journal.add(row, attempt, reply)
    (journal.folder / ".00000004-000.json.x").mkdir()
    assert journal.read() == replies
    journal.close(replies)
    assert journal.read() == Journal(UPath(tmp_path), 5).read() == replies
    assert Journal(UPath(tmp_path), 6).read() == {}
    memory = UPath("memory://journals/x")
    remote = Journal(memory, 0)
    assert remote.read() == {}
    remote.add(0, 0, replies[11][0])
    assert remote.read() == {0: replies[11]}
    remote.close(remote.read())
    assert Journal(memory, 0).read() == {0: replies[11]}
