"""Benchmarks run alone, check that rivals do the same work, and end with one line of figures."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

FOLDER = ROOT / "tests" / "bench"
BENCHMARKS = [*sorted(FOLDER.glob("bench_*.py")), FOLDER / "endurance.py"]

pytestmark = pytest.mark.slow


def quick(name: str) -> str:
    """Standard output of a benchmark's quick run."""
    command = [sys.executable, str(FOLDER / f"bench_{name}.py"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", BENCHMARKS, ids=[script.stem for script in BENCHMARKS])
def test_benchmark_documents_its_command_and_comparison(script: Path) -> None:
    # Its --help is its docstring. Read without a process: imports alone would take two minutes for all of them.
    module = ast.parse(script.read_text(encoding="utf-8"))
    text = ast.get_docstring(module) or ""
    assert f"tests/bench/{script.name}" in text
    assert "--quick" in text
    assert "rival" in text.lower()
    calls = {ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
    assert {"arguments", "report"} <= calls, "the options and the line of figures are those of harness.py"


@pytest.mark.parametrize("name", ["decode", "summaries"])
def test_benchmark_ends_with_a_line_of_figures(name: str) -> None:
    figures = json.loads(quick(name).splitlines()[-1])
    assert (figures["bench"], figures["quick"]) == (name, True)
    assert figures["ratio"] > 0
