"""`--help` of an entry loads nothing that takes seconds to import."""

import subprocess
import sys

from tests.support.places import ROOT

ENTRIES = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py") if path.stem != "__init__")
HEAVY = ("torch", "transformers", "ray", "mlflow", "pandas", "pyarrow.dataset", "lance")
PRINT_HELP = """
import contextlib, importlib, io, sys
for name in sys.argv[1].split():
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"pipelines.{name}").main(["--help"])
    print(name, *(package for package in sys.argv[2].split() if package in sys.modules))
"""


def test_help_loads_no_heavy_package() -> None:
    # One process for all: the first line that names a package is the entry that loaded it.
    command = [sys.executable, "-c", PRINT_HELP, " ".join(ENTRIES), " ".join(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ENTRIES
