"""Ray jobs: one entry per verb, and what the entries need, by stage."""

from importlib.util import find_spec

if find_spec("ray") is None:
    raise ModuleNotFoundError(
        "the pipelines need Ray and other packages that are not installed; run: pip install 'longclip[pipelines]'",
        name="ray",
    )
