"""Model cards in the registry: in the files of a version, and as its description."""

import tempfile
from pathlib import Path, PurePosixPath

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from longclip.errors import ConfigError, one_line
from longclip.model_uri import ModelUri
from pipelines.common.events import warn
from pipelines.registry.model_card import MEASURED, NOTHING_MEASURED, PROMOTION, description, with_section
from pipelines.registry.versions import logged_model_id

CARD = PurePosixPath("artifacts/README.md")
"""The card in the files of a version."""


def add_to_card(uri: str, name: str, version: str, title: str, body: str) -> None:
    """Write a section into the card of a version, in its files and in its description.

    If MLflow does not take it, this prints a warning and raises nothing: what the section says is also in a run.
    """
    try:
        registered = MlflowClient(uri).get_model_version(name, version)
        stored = _stored_card(uri, name, version)
        card = with_section(stored or registered.description or f"# {name}\n", title, body)
        if title == PROMOTION and NOTHING_MEASURED in card:
            card = with_section(card, MEASURED, f"{NOTHING_MEASURED} See the section {PROMOTION}.")
        if stored and (model_id := logged_model_id(uri, name, version)):
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / CARD.name
                file.write_text(card)
                MlflowClient(uri).log_model_artifact(model_id, str(file), str(CARD.parent))
        MlflowClient(uri).update_model_version(name, version, description(card))
    except (ConfigError, MlflowException) as error:
        warn(f"the model card of version {version} of '{name}' was not changed: {one_line(error, 200)}")


def _stored_card(uri: str, name: str, version: str) -> str:
    """The card in the files of a version; empty if there is none, as in versions that others registered."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = f"{ModelUri(name, version)}/{CARD}"
        try:
            file = mlflow.artifacts.download_artifacts(artifact_uri=artifact, dst_path=scratch, tracking_uri=uri)
        except (MlflowException, OSError):
            return ""
        return Path(file).read_text(encoding="utf-8")
