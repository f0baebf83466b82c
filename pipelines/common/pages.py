"""HTML reports: the templates of all stages, which extend one page."""

from pathlib import Path

import jinja2

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
"""Templates by their path below `pipelines/`, such as `data/report.html`."""
