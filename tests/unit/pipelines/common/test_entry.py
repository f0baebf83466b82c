"""Exit codes of the entries for paths that cannot be written, and for bugs, which keep their traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longclip.errors import ConfigError, DataError
from pipelines import promote
from pipelines.common.entry import run_entry, user_error


def link_to_itself(directory: Path) -> None:
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "loop" / "rows").mkdir()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda d: (d / "file").mkdir(exist_ok=True), "file' cannot be used: it exists and is not a directory"),
        (lambda d: (d / "file" / "below").mkdir(parents=True), "a part of it is a file"),
        (lambda d: (d / "file" / "below").write_text("x"), "a part of it is a file"),
        (lambda d: d.write_text("x"), "it is a directory, not a file"),
        (lambda d: (d / ("long" * 100)).mkdir(), "it is too long"),
        (link_to_itself, "leads back to itself"),
    ],
)
def test_unusable_paths_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], reason: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as left:
        run_entry(lambda: write(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == ConfigError.exit_code
    assert line.startswith(f"error: the path '{tmp_path}")
    assert reason in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_forbidden_paths_are_one_line(number: int) -> None:
    error = user_error(OSError(number, os.strerror(number), "/data/out"))
    assert isinstance(error, ConfigError)
    assert "'/data/out'" in str(error)


def test_bugs_keep_their_traceback(tmp_path: Path) -> None:
    assert user_error(OSError(errno.EEXIST, "no file name")) is None
    assert user_error(OSError(errno.EBADF, os.strerror(errno.EBADF), "/data/out")) is None
    handled, raised = FileExistsError(errno.EEXIST, "exists", "/data/out"), KeyError("a bug")
    raised.__context__ = handled
    assert user_error(raised) is None
    raised.__cause__ = handled
    assert isinstance(user_error(raised), ConfigError)
    mistake = DataError("the reason")
    handled.__context__ = mistake
    assert user_error(raised) is mistake, "our own message says more"


def test_promotion_refuses_a_file_as_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "var").write_text("a file")
    with pytest.raises(SystemExit) as left:
        run_entry(lambda: promote.main(["--set", f"directory={tmp_path}/var", "--set", f"tasks.mine.input={tmp_path}"]))
    assert left.value.code == ConfigError.exit_code
    assert f"error: the path '{tmp_path}/var' cannot be used" in capsys.readouterr().err
