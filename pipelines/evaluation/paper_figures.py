"""Figures of papers, to compare results with."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

PAPER_FIGURES = Path(__file__).with_name("paper_figures.yaml")


@cache
def paper_figures() -> dict[str, list[dict[str, Any]]]:
    """Figures of papers by the name of their model."""
    return yaml.safe_load(PAPER_FIGURES.read_text())
