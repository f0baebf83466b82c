"""The model to serve: resolved once by the builder, downloaded by each replica.

An alias such as `models:/longclip@champion` can move while the application runs. The builder resolves it to a version
and to the checkpoint id of that version; replicas download exactly that and refuse anything else.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from longclip.checkpoint import checkpoint_id, load_checkpoint, verify_checkpoint
from longclip.errors import CheckpointError, one_line
from longclip.images import ImageTransform
from longclip.lineage import Lineage, read_lineage
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG, ModelUri, is_model_uri, parse_model_uri
from serving.node_cache import cached

MLFLOW_RETRIES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Defaults of environment variables. MLflow's own make it retry for many minutes if the registry is down."""


@dataclass(frozen=True)
class Location:
    """Location of a checkpoint, with aliases resolved."""

    name: str
    version: str | None
    """Registered version; None for a directory."""
    uri: str
    """An absolute directory, or `models:/name/version`."""
    cache: str
    """Directory for downloads, on each node."""
    source: str = ""
    """Artifact storage of the registered version: distinguishes equal names and versions of two registries."""
    manifest_sha256: str | None = None
    """Expected checksum of the checkpoint's manifest, from the registry; None if the registry has none."""


@dataclass(frozen=True)
class Model:
    """A verified checkpoint and its properties."""

    location: Location
    checkpoint_id: str
    context_length: int
    embedding_dim: int
    transform: ImageTransform
    lineage: Lineage

    @property
    def version(self) -> str:
        """The registered version, or the checkpoint id of a directory."""
        return self.location.version or self.checkpoint_id


def open_model(model: str, cache: str) -> Model:
    """Resolve a model and load it once, so that an invalid one is refused before anything is deployed.

    Args:
        model: a checkpoint directory, `models:/name/version` or `models:/name@alias`.
        cache: directory for downloads.

    Raises:
        CheckpointError: there is no such model, or it is not a CLIP model.
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
        lineage=read_lineage(directory),
    )


def fetch_model(model: Model) -> Path:
    """The model's checkpoint directory on this node, verified to be the one that the builder resolved.

    Raises:
        CheckpointError: it cannot be downloaded, is damaged, or has changed since the application was built.
    """
    directory = _download(model.location)
    if model.location.version is not None:
        verify_checkpoint(directory, model.location.manifest_sha256)  # the cached files may have been changed
    actual_id = _weights_id(directory)
    if actual_id != model.checkpoint_id:
        raise CheckpointError(
            f"checkpoint '{directory}' has id {actual_id}, but the application was built for {model.checkpoint_id};"
            " deploy again to serve the changed one"
        )
    return directory


def _weights_id(directory: Path) -> str:
    try:
        return checkpoint_id(directory)
    except OSError as error:
        raise CheckpointError(f"checkpoint '{directory}' has no readable model.safetensors") from error


def _locate(model: str, cache: str) -> Location:
    if not is_model_uri(model):
        return Location("", None, str(Path(model).expanduser().absolute()), cache)
    uri = parse_model_uri(model)
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow would create an empty registry in the working directory
        raise CheckpointError(
            f"model '{model}' is in a registry, but MLFLOW_TRACKING_URI is not set; set it, for example to"
            " sqlite:////data/mlflow.db or http://mlflow:5000, or give a checkpoint directory"
        )
    for name, value in MLFLOW_RETRIES.items():
        os.environ.setdefault(name, value)
    # Imported late: MLflow takes seconds to import, and a directory does not need it.
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        if uri.alias:
            version = client.get_model_version_by_alias(uri.name, uri.alias)
        else:
            version = client.get_model_version(uri.name, uri.version)
    except MlflowException as error:
        raise CheckpointError(
            f"model '{model}' cannot be found in the registry (MLFLOW_TRACKING_URI): {one_line(error)}"
        ) from error
    number = str(version.version)
    resolved = str(ModelUri(uri.name, number))
    return Location(uri.name, number, resolved, cache, str(version.source), version.tags.get(MANIFEST_TAG))


def _download(location: Location) -> Path:
    """The checkpoint directory of a location, downloaded to the cache if it is in a registry."""
    if location.version is None:
        return Path(location.uri)
    key = hashlib.sha256(f"{location.uri}\0{location.source}".encode()).hexdigest()[:16]
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    def download(temporary: Path) -> Path:
        try:
            path = download_artifacts(artifact_uri=f"{location.uri}/{CHECKPOINT_ARTIFACT}", dst_path=str(temporary))
        except (MlflowException, OSError) as error:
            reason = one_line(error, 1000)  # long paths precede the reason in MLflow's messages
            raise CheckpointError(f"cannot download {CHECKPOINT_ARTIFACT} of '{location.uri}': {reason}") from error
        verify_checkpoint(path, location.manifest_sha256)
        return Path(path)

    return cached(Path(location.cache) / key, download)
