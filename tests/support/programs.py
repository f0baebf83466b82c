"""System programs that some tests need."""

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> str | None:
    """Path of a system program; those of PostgreSQL are not where programs are looked for."""
    folders = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join(folders))


def needs_programs(*names: str, packages: str = "chromium, chromium-driver") -> pytest.MarkDecorator:
    """Skip tests where system programs are absent; continuous integration, which installs them, fails instead."""
    missing = ", ".join(name for name in names if program(name) is None)
    if missing and os.environ.get("LONGCLIP_REQUIRE_SYSTEM_PACKAGES"):
        pytest.exit(f"{missing} must be installed here", returncode=1)
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed (Debian packages {packages})")
