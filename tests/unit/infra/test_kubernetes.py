"""The manifests as Kustomize renders them, against Kubernetes' own schemas, KubeRay's API and our entries."""

import copy
import functools
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import importlib_resources
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from longclip import __version__
from longclip.errors import ConfigError
from serving.app import AppArgs
from tests.support.places import ROOT, pinned
from tests.support.programs import program

# Not one of the packages that continuous integration installs: that of Debian 12 (kubectl 1.20) knows no components.
pytestmark = pytest.mark.skipif(
    program("kubectl") is None and program("kustomize") is None,
    reason="neither kubectl (1.21 or newer) nor kustomize is installed",
)

KUBERNETES = ROOT / "infra" / "kubernetes"
OVERLAYS = ["overlays/cpu", "overlays/gpu", "overlays/dev", "overlays/high-availability", "jobs/cpu", "jobs/gpu"]
VERSION = "1.34"
FOR_MANY_NODES = {
    ("proxy_location",),
    ("http_options", "host"),
    *(
        ("applications", 0, "args", name)
        for name in ("index", "cache", "replicas", "replica_gpus", "max_surge_percent")
    ),
}
"""Where the application of RayService may differ from infra/serve.yaml."""


@functools.cache
def _render(overlay: str) -> str:
    command = ["kubectl", "kustomize"] if program("kubectl") else ["kustomize", "build"]
    return subprocess.run([*command, KUBERNETES / overlay], capture_output=True, text=True, check=True).stdout


def rendered(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay."""
    return list(yaml.safe_load_all(_render(overlay)))


def find(kind: str, overlay: str, name: str = "longclip") -> dict[str, Any]:
    (found,) = [item for item in rendered(overlay) if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


@functools.cache
def kuberay_validator() -> Draft202012Validator:
    """KubeRay's fields from tests/support/kuberay.json; of Kubernetes' own, the strict schemas."""
    folder = importlib_resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{VERSION}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    schema = json.loads((ROOT / "tests" / "support" / "kuberay.json").read_text())
    return Draft202012Validator(schema, registry=definitions @ Registry())


def validate(item: dict[str, Any]) -> None:
    """Raises `ValidationError` for what an API server would not take as it is meant."""
    if item["apiVersion"] == "ray.io/v1":
        kuberay_validator().validate(item)
    else:
        kubernetes_validate.validate(item, VERSION, strict=True)


def validate_entry(command: str) -> None:
    """Parse the command line of a job with the settings of its entry.

    Raises:
        ConfigError: a setting is unknown or its value is refused.
    """
    python, script, *arguments = shlex.split(command)
    path = Path(script).relative_to("/srv/longclip")
    assert python == "python"
    assert (ROOT / path).is_file()
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    (kind,) = [
        value
        for name, value in vars(module).items()
        if name.lower() == f"{path.stem}settings" and isinstance(value, type)
    ]
    module.load_settings(kind, "", arguments)


def pod_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod that is described anywhere in an object."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pod_specs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_specs(inner)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Values of nested mappings and lists by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {place: leaf for key, inner in items for place, leaf in leaves(inner, (*path, key)).items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_matches_its_api(overlay: str) -> None:
    objects = rendered(overlay)
    assert objects
    for item in objects:
        validate(item)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.enableIntreeAutoscaling", True),
        ("RayCluster", "spec.authOptions.mode", "tokens"),
        ("RayCluster", "spec.autoscalerOptions.upscalingMode", "Fast"),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas", "8"),
        ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers.0.imagePullPolice", "Always"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayService", "spec.rayClusterConfig.headGroupSpec", None),
        ("RayService", "spec.upgradeStrategy.type", "Rolling"),
        ("NetworkPolicy", "spec.ingres", []),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany"),
        ("PodDisruptionBudget", "spec.selector.matchLabel", {}),
    ],
)
def test_a_broken_object_is_seen(kind: str, path: str, value: Any) -> None:
    item = copy.deepcopy(next(item for item in rendered("overlays/gpu") if item["kind"] == kind))
    validate(item)
    *parents, leaf = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = item
    for part in parents:
        place = place[part]
    place[leaf] = value
    with pytest.raises(ValidationError):
        validate(item)


@pytest.mark.parametrize("overlay", ["jobs/cpu", "jobs/gpu"])
def test_jobs_name_entries_and_settings_that_exist(overlay: str) -> None:
    jobs = {item["metadata"]["name"]: item["spec"] for item in rendered(overlay)}
    assert jobs.keys() == {"prepare", "summarize", "finetune", "embed"}
    cluster = find("RayCluster", "overlays/cpu")
    for job in jobs.values():
        validate_entry(job["entrypoint"])
        assert not any(name.startswith("entrypointNum") for name in job)  # the driver stays on the head
        assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("model.base=", "model.bass="), ("workers.count=4", "workers.count=five"), ("batch_size=192", "batch_size=128")],
)
def test_a_setting_that_its_entry_refuses_is_seen(right: str, wrong: str) -> None:
    command = find("RayJob", "jobs/gpu", "finetune")["spec"]["entrypoint"]
    assert right in command
    with pytest.raises(ConfigError):
        validate_entry(command.replace(right, wrong))


@pytest.mark.parametrize("overlay", OVERLAYS[:4])
def test_the_service_deploys_what_serve_yaml_deploys(overlay: str) -> None:
    config = yaml.safe_load(find("RayService", overlay)["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    arguments = AppArgs.model_validate(application.args)
    assert arguments.replica_gpus == (0 if overlay in ("overlays/cpu", "overlays/dev") else 1)
    ours, theirs = leaves(config), leaves(yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text()))
    assert {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)} <= FOR_MANY_NODES


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_more_rights_than_they_need(overlay: str) -> None:
    for item in rendered(overlay):
        for pod in pod_specs(item):
            security = pod["securityContext"]
            assert security["runAsNonRoot"]
            assert security["runAsUser"] == 1000
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert container["resources"]["requests"].keys() == {"cpu", "memory"}
                assert "memory" in container["resources"]["limits"]
                assert {"readinessProbe", "livenessProbe"} <= container.keys() or item["kind"] == "RayJob"


@pytest.mark.parametrize("overlay", OVERLAYS[:4])
def test_clusters_ask_for_a_token_and_only_the_application_is_open_to_all(overlay: str) -> None:
    clusters = [find("RayCluster", overlay)["spec"], find("RayService", overlay)["spec"]["rayClusterConfig"]]
    assert all(cluster["authOptions"] == {"mode": "token"} for cluster in clusters)
    policies = [item["spec"] for item in rendered(overlay) if item["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]
    for cluster in clusters:
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all(group["template"]["metadata"]["labels"] in selected for group in groups)
    to_all = [rule for policy in policies for rule in policy["ingress"] if "from" not in rule]
    assert to_all == [{"ports": [{"protocol": "TCP", "port": 8000}]}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references_to_existing_objects(overlay: str) -> None:
    text = _render(overlay)
    assert "kind: Secret\n" not in text
    objects = rendered(overlay)
    for kind, pattern in (
        ("ConfigMap", r"configMapRef:\s+name: (\S+)"),
        ("PersistentVolumeClaim", r"claimName: (\S+)"),
    ):
        there = {item["metadata"]["name"] for item in objects if item["kind"] == kind}
        assert set(re.findall(pattern, text)) == there
    read_me = (ROOT / "infra" / "README.md").read_text()
    for secret in re.findall(r"secret(?:Key)?Ref:\s+(?:key: \S+\s+)?name: (\S+)", text):
        assert f"secret generic {secret} " in read_me


def test_versions_are_those_of_the_constraints_and_of_the_project() -> None:
    sources = "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    assert re.findall(r'rayVersion: "(\S+)"', sources) == [pinned("ray")]
    for overlay in OVERLAYS:
        versions = set(re.findall(r"rayVersion: (\S+)", _render(overlay)))
        assert versions <= {pinned("ray")}
        images = set(re.findall(r"image: (\S+)", _render(overlay)))
        assert len(images) == 1
    assert set(re.findall(r"newTag: (\d\S*)-", sources)) == {__version__}


def test_workers_on_spot_machines_come_and_go() -> None:
    cluster = find("RayCluster", "overlays/gpu")["spec"]
    assert cluster["enableInTreeAutoscaling"]
    (spot,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu-spot"]
    assert spot["minReplicas"] < spot["maxReplicas"]
    pod = spot["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"]
    assert pod["tolerations"]


def test_the_head_of_the_highly_available_overlay_may_be_lost() -> None:
    cluster = find("RayCluster", "overlays/high-availability")["spec"]
    service = find("RayService", "overlays/high-availability")["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"] == service["gcsFaultToleranceOptions"]
    assert "valueFrom" in cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert "gcsFaultToleranceOptions" not in find("RayCluster", "overlays/gpu")["spec"]
