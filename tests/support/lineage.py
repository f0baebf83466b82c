"""What a registry made by the entries must say of its champion, and the script of docs/evaluation.md that prints it."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from longclip import __version__
from longclip.checkpoint import MANIFEST, checkpoint_id
from longclip.lineage import Lineage, read_lineage
from serving.model_source import fetch_model, open_model
from tests.support.places import ROOT


def assert_trained_from(client: MlflowClient, checkpoint: Path, data: Path, base: Path) -> Lineage:
    """The checkpoint names its run, the manifest of its data and its base, and so does the run."""
    lineage = read_lineage(checkpoint)
    digest = hashlib.sha256((data / "_manifest.json").read_bytes()).hexdigest()[:16]
    assert (lineage.data_digest, lineage.data_digest_of) == (digest, "manifest")
    assert (lineage.base, lineage.base_checkpoint_id) == (base.parent.name, checkpoint_id(base))
    assert (lineage.base_run_id, lineage.code_version) == (read_lineage(base).run_id, __version__)
    assert lineage.base_run_id not in (None, lineage.run_id)
    run = client.get_run(str(lineage.run_id))
    assert run.info.status == "FINISHED"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (data.name, digest)
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    return lineage


def assert_champion_leads_back(
    client: MlflowClient, lineage: Lineage, figures: dict[str, float], scratch: Path
) -> None:
    """Version 2 replaced version 1 as champion: its source run is the training run, and it shows what was measured.

    Args:
        client: of the registry.
        lineage: of the registered checkpoint.
        figures: the benchmark's figures that it was registered with.
        scratch: directory for downloads.
    """
    version = client.get_model_version_by_alias("longclip", "champion")
    assert (version.version, version.run_id) == (2, lineage.run_id)
    run = client.get_run(version.run_id)
    assert (run.info.status, run.info.end_time < version.creation_timestamp) == ("FINISHED", True), "run was reopened"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    measured = {metric.key: metric.value for metric in model.metrics}
    assert measured["loss"] == client.get_metric_history(version.run_id, "loss")[-1].value
    assert figures
    assert {name.replace("@", "_at_"): value for name, value in figures.items()}.items() <= measured.items()

    promotion = client.get_run(version.tags["promotion_run_id"])
    assert promotion.data.tags["promoted"] == "true"
    compared = {name: promotion.data.metrics[f"long/text_to_image/{name}"] for name in ("difference", "holds")}
    assert compared == {"difference": 0.0, "holds": 1.0}
    assert model.model_id in [used.model_id for used in promotion.inputs.model_inputs]
    card = mlflow.artifacts.download_artifacts(
        artifact_uri="models:/longclip/2/artifacts/README.md", dst_path=str(scratch)
    )
    for text in (version.description, Path(card).read_text()):
        assert f"- training run: `{lineage.run_id}`, the source run of this version" in text
        assert f"digest `{lineage.data_digest}` of its manifest" in text
        assert f"Made `champion` in place of version 1. MLflow run `{promotion.info.run_id}`" in text

    served = open_model("models:/longclip@champion", str(scratch / "cache"))
    assert (served.lineage, served.checkpoint_id) == (lineage, version.tags["checkpoint_id"])
    manifest = json.loads((fetch_model(served) / MANIFEST).read_text())
    assert manifest["checkpoint_id"] == served.checkpoint_id


def run_documented_script() -> str:
    """Run the script of docs/evaluation.md that starts from the champion; returns what it prints."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "champion" in block]
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
