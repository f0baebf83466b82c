"""The model to serve: found once by the builder, fetched by every replica.

An alias such as `models:/longclip@champion` can move while the application runs. The builder turns it into a version
and that version's content into a checkpoint id; replicas fetch exactly that and refuse anything else.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from longclip.checkpoint import checkpoint_id, load_checkpoint, verify_checkpoint
from longclip.errors import CheckpointError, one_line
from longclip.images import ImageTransform
from serving.node_cache import cached

REGISTRY_SCHEME = "models:/"
CHECKPOINT_PATH = "artifacts/checkpoint"
"""Where a registered pyfunc model keeps its checkpoint directory. Nothing else of it is downloaded or read."""

MANIFEST_TAG = "manifest_sha256"
"""Tag of a version with the checksum of its checkpoint's manifest."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""MLflow's own patience with a registry that is down is many minutes; what the environment says counts first."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies, free of anything that can move."""

    name: str
    version: str | None
    """Version in the registry; None for a directory."""
    uri: str
    """An absolute directory, or `models:/name/version`."""
    cache: str
    """Directory of this node that keeps what was downloaded."""
    source: str = ""
    """Storage of the registered version: tells equal names and versions of two registries apart."""
    manifest_sha256: str | None = None
    """What the checkpoint's manifest must be, as the registry keeps it; None where it does not."""


@dataclass(frozen=True)
class Model:
    """A checkpoint that was found good, and all that other deployments need to know of it."""

    location: Location
    checkpoint_id: str
    context_length: int
    embedding_dim: int
    transform: ImageTransform

    @property
    def version(self) -> str:
        """The registry's version, or the checkpoint id of an unregistered directory."""
        return self.location.version or self.checkpoint_id


def open_model(model: str, cache: str) -> Model:
    """Find a model and load it once, so that a bad one is refused before anything is deployed.

    Args:
        model: a checkpoint directory, `models:/name/version` or `models:/name@alias`.
        cache: directory for downloads.

    Raises:
        CheckpointError: there is no such model, or it is no CLIP.
    """
    location = _locate(model, str(Path(cache).expanduser()))
    directory = _download(location)
    checkpoint = load_checkpoint(directory)
    return Model(
        location=replace(location, name=location.name or directory.name),
        checkpoint_id=_weights_id(directory),
        context_length=checkpoint.context_length,
        embedding_dim=checkpoint.model.config.projection_dim,
        transform=checkpoint.transform,
    )


def fetch(model: Model) -> Path:
    """The model's checkpoint directory on this node, verified to be the one that the builder found."""
    directory = _download(model.location)
    if model.location.version is not None:
        verify_checkpoint(directory, model.location.manifest_sha256)  # the cache may have been changed since
    found = _weights_id(directory)
    if found != model.checkpoint_id:
        raise CheckpointError(
            f"checkpoint '{directory}' has id {found}, but the application was built for {model.checkpoint_id};"
            " deploy again to serve the changed one"
        )
    return directory


def _weights_id(directory: Path) -> str:
    try:
        return checkpoint_id(directory)
    except OSError as error:
        raise CheckpointError(f"checkpoint '{directory}' has no readable model.safetensors") from error


def _locate(model: str, cache: str) -> Location:
    if not model.startswith(REGISTRY_SCHEME):
        return Location("", None, str(Path(model).expanduser().absolute()), cache)
    for name, value in MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    # Imported here: MLflow takes seconds to import, and a plain directory does not need it.
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name, at, alias = model.removeprefix(REGISTRY_SCHEME).partition("@")
    version = ""
    if not at:
        name, _, version = name.partition("/")
    if not name or not (alias or version.isdecimal()):
        raise CheckpointError(f"model '{model}' is neither models:/NAME/VERSION nor models:/NAME@ALIAS")
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow would make an empty registry where the server was started
        raise CheckpointError(
            f"model '{model}' lies in a registry, and MLFLOW_TRACKING_URI does not say in which; set it, for example to"
            " sqlite:////data/mlflow.db or http://mlflow:5000, or name a checkpoint directory"
        )
    client = MlflowClient()
    try:
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
    except MlflowException as error:
        raise CheckpointError(
            f"model '{model}' cannot be found in the registry (MLFLOW_TRACKING_URI): {one_line(error)}"
        ) from error
    uri = f"{REGISTRY_SCHEME}{name}/{found.version}"
    return Location(name, str(found.version), uri, cache, str(found.source), found.tags.get(MANIFEST_TAG))


def _download(location: Location) -> Path:
    """The checkpoint directory of a location, downloaded to the cache where it is not local."""
    if location.version is None:
        return Path(location.uri)
    key = hashlib.sha256(f"{location.uri}\0{location.source}".encode()).hexdigest()[:16]
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    def download(aside: Path) -> Path:
        try:
            path = download_artifacts(artifact_uri=f"{location.uri}/{CHECKPOINT_PATH}", dst_path=str(aside))
        except (MlflowException, OSError) as error:
            reason = one_line(error, 1000)  # MLflow names long paths before it says why
            raise CheckpointError(f"cannot download {CHECKPOINT_PATH} of '{location.uri}': {reason}") from error
        verify_checkpoint(path, location.manifest_sha256)
        return Path(path)

    return cached(Path(location.cache) / key, download)
