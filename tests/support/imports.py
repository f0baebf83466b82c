"""Imports, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT


def sources(room: str) -> list[Path]:
    """All Python files below a folder of the repository."""
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Full names of the modules that a source text imports, anywhere in it; `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}." * bool(node.level) + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module"):
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def imported_packages(path: Path) -> set[str]:
    """Names of the top-level packages that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parts[0]
    return {name.split(".")[0] for name in imported_modules(path.read_text(encoding="utf-8"), package)}
