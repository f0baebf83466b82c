"""Steps of the demo: done once, their progress shown, their failures told in one line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from longclip.errors import DataError, LongClipError
from pipelines.common.events import report
from pipelines.experiments.steps import Step, run_step


class CountingEntry(ModuleType):
    """An entry that notes how it was called."""

    def __init__(self) -> None:
        super().__init__("pipelines.counting")
        self.calls: list[list[str]] = []
        self.error: Exception | None = None

    def main(self, argv: Sequence[str]) -> None:
        self.calls.append(list(argv))
        print("settings:\n  nobody wants to read this")
        print("counting: 7 rows in, printed but not reported")
        report("counting: 3 rows in, 2 out, 1 rejected, 0.1 s")
        print("a traceback", file=sys.stderr)
        if self.error:
            raise self.error


def test_a_step_is_done_once_for_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = CountingEntry()
    run_step("[1/1]", Step("count things", entry, rows=3, input="x"), tmp_path)
    out = capsys.readouterr().out
    assert "python pipelines/counting.py --set rows=3 --set input=x" in out
    assert "    counting: 3 rows in, 2 out, 1 rejected, 0.1 s" in out
    assert "nobody wants" not in out
    assert "printed but not reported" not in out
    log = (tmp_path / "logs" / "count-things.log").read_text()
    assert "nobody wants" in log
    assert "counting: 3 rows in, 2 out, 1 rejected, 0.1 s" in log
    assert "a traceback" in log

    run_step("[1/1]", Step("count things", entry, rows=3, input="x"), tmp_path)
    assert "done before" in capsys.readouterr().out
    run_step("[1/1]", Step("count things", entry, rows=4, input="x"), tmp_path)
    assert entry.calls == [["--set", f"rows={rows}", "--set", "input=x"] for rows in (3, 4)]


@pytest.mark.parametrize("error", [DataError("column 'x' is missing"), ValueError("bad\nvalue")])
def test_failed_step_reports_reason_and_log(tmp_path: Path, error: Exception) -> None:
    entry = CountingEntry()
    entry.error = error
    step = Step("count", entry)
    with pytest.raises(LongClipError) as caught:
        run_step("[1/1]", step, tmp_path)
    assert str(error).splitlines()[0] in str(caught.value)
    assert str(tmp_path / "logs" / "count.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    entry.error = None
    run_step("[1/1]", step, tmp_path)
    assert len(entry.calls) == 2
