"""Who may import whom, read from the source; and the traps that file names and futures set for Ray."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.support.imports import imported_modules, imported_packages, sources
from tests.support.places import ROOT

ROOMS = ("longclip", "pipelines", "serving")
FORBIDDEN = {
    "longclip": {"ray", "mlflow", "fastapi", "starlette", "pydantic", "pipelines", "serving"},
    "pipelines": {"serving"},
    "serving": {"pipelines"},
}
MAX_LINES = 400


def test_imports_are_seen_wherever_they_are() -> None:
    source = (
        "import a.b\nfrom c.d import e\ndef f():\n    import g\n    importlib.import_module('h.i')\nfrom . import j\n"
    )
    packages = {name.split(".")[0] for name in imported_modules(source, "room")}
    assert packages == {"a", "c", "g", "h", "room"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction(room: str) -> None:
    assert sources(room)
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sources(room)
        if (found := imported_packages(path) & FORBIDDEN[room])
    }
    assert wrong == {}


def test_one_place_of_each_package_imports_mlflow() -> None:
    places = {path.relative_to(ROOT) for room in ROOMS for path in sources(room) if "mlflow" in imported_packages(path)}
    assert {str(path.parent if path.parts[0] == "pipelines" else path) for path in places} == {
        "pipelines/registry",
        "serving/model_source.py",
    }


def test_application_builder_has_real_annotations() -> None:
    # Ray Serve reads the builder's annotations to validate its arguments; as strings it would skip that silently.
    path = ROOT / "serving" / "app.py"
    assert "__future__.annotations" not in imported_modules(path.read_text(encoding="utf-8"), "serving")


def test_no_pipeline_hides_an_installed_module(monkeypatch: pytest.MonkeyPatch) -> None:
    # `python pipelines/x.py` puts pipelines/ first on sys.path: a file there would be imported in the module's stead.
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "pipelines"]
    )
    names = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
    names |= {path.name for path in (ROOT / "pipelines").iterdir() if (path / "__init__.py").exists()}
    hidden = {name for name in names if name in sys.stdlib_module_names or importlib.util.find_spec(name)}
    assert hidden == set()


def test_only_entries_are_directly_in_pipelines() -> None:
    modules = [path for path in (ROOT / "pipelines").glob("*.py") if path.name != "__init__.py"]
    assert modules
    assert [path.name for path in modules if "run_entry(main)" not in path.read_text(encoding="utf-8")] == []


def test_no_test_imports_another_test() -> None:
    # Helpers are in tests/support. A test file that another one imports cannot be moved or run without it.
    wrong = {
        str(path.relative_to(ROOT)): sorted(tests)
        for path in sources("tests")
        if (tests := {name for name in imported_modules(path.read_text(encoding="utf-8"), "tests") if ".test_" in name})
    }
    assert wrong == {}


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_files_stay_short(room: str) -> None:
    files = [*sources(room), *(ROOT / room).rglob("*.js")]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
