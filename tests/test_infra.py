"""What deploys the project on machines, against the schemas of those that read it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "Dockerfile"


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run([program, "--no-color", dockerfile], capture_output=True, text=True, check=False)


def test_the_dockerfile_passes_its_linter() -> None:
    result = hadolint(DOCKERFILE)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("python:3.11.14-slim-bookworm", "python:latest", "DL3007"),
        ("HEALTHCHECK", "HEALTHCHEK", "unexpected 'H'"),
    ],
)
def test_the_linter_sees_a_broken_dockerfile(tmp_path: Path, right: str, wrong: str, rule: str) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace(right, wrong))
    result = hadolint(broken)
    assert result.returncode != 0
    assert rule in result.stdout + result.stderr


def test_the_image_takes_its_versions_from_the_constraints() -> None:
    commands = [line for line in DOCKERFILE.read_text().splitlines() if "pip install" in line]
    assert len(commands) == 3
    for command in commands:
        assert "constraints.txt" in command
        assert not re.search(r"==\d", command)


def test_the_builder_gets_what_the_image_copies_and_no_more() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
