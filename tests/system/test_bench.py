"""Benchmarks run alone, check that rivals do the same work, and end with one line of figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

FOLDER = ROOT / "tests" / "bench"
BENCHMARKS = [*sorted(FOLDER.glob("bench_*.py")), FOLDER / "endurance.py"]

pytestmark = pytest.mark.slow


def run(script: Path, *arguments: str) -> str:
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", BENCHMARKS, ids=[script.stem for script in BENCHMARKS])
def test_a_benchmark_says_what_it_compares(script: Path) -> None:
    text = run(script, "--help")
    assert "--quick" in text
    assert "rival" in text.lower()


@pytest.mark.parametrize("name", ["decode", "summaries"])
def test_a_benchmark_ends_with_a_line_of_figures(name: str) -> None:
    figures = json.loads(run(FOLDER / f"bench_{name}.py", "--quick").splitlines()[-1])
    assert (figures["bench"], figures["quick"]) == (name, True)
    assert figures["ratio"] > 0
