"""Registered versions in MLflow: aliases and downloads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from longclip.errors import CheckpointError, PromotionError, one_line
from longclip.files import whole_directory
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG, SCHEME, ModelUri, parse_model_uri
from pipelines.registry.server import explained

REPLACED_TAG = "replaced_version"
"""Tag of a version: the version that it replaced under an alias."""

PROMOTION_TAG, REFUSAL_TAG, ROLLBACK_TAG = "promotion_run_id", "refusal_run_id", "rollback_run_id"
"""Tags of a version: the runs that made it champion, refused that, or took it back."""


@dataclass(frozen=True)
class Version:
    """A registered version."""

    uri: str
    """`models:/name/version`."""
    source: str
    """Location of its artifacts; distinguishes equal names and versions of two registries."""


def resolve_version(uri: str, model: str) -> Version:
    """A registered model by its version, `models:/name/version`, or an alias, `models:/name@alias`.

    Raises:
        CheckpointError: it is not in the registry, or the registry does not answer.
    """
    named = parse_model_uri(model)
    client = MlflowClient(uri)
    try:
        if named.alias:
            version = client.get_model_version_by_alias(named.name, named.alias)
        else:
            version = client.get_model_version(named.name, named.version)
    except MlflowException as error:
        raise CheckpointError(
            f"model '{model}' cannot be found in the registry at '{uri}': {one_line(error, 200)}"
        ) from error
    return Version(str(ModelUri(named.name, str(version.version))), str(version.source))


def download_checkpoint(uri: str, model: str, directory: Path) -> None:
    """Download only the checkpoint of a registered version, to a new `directory`.

    Its files are verified against their manifest, and the manifest against the checksum in the registry.

    Args:
        uri: tracking server.
        model: `models:/name/version`.
        directory: created when the download is complete and verified.

    Raises:
        CheckpointError: the artifacts cannot be read, or differ from what was registered.
    """
    from longclip.checkpoint import verify_checkpoint  # loads torch, which moving an alias does not need

    registered = parse_model_uri(model)
    artifacts = f"{model}/{CHECKPOINT_ARTIFACT}"
    with whole_directory(directory) as partial:
        try:
            tags = MlflowClient(uri).get_model_version(registered.name, registered.version).tags
            path = mlflow.artifacts.download_artifacts(artifact_uri=artifacts, dst_path=str(partial), tracking_uri=uri)
        except (MlflowException, OSError) as error:
            raise CheckpointError(f"'{artifacts}' cannot be downloaded: {one_line(error, 200)}") from error
        downloaded = Path(path)
        verify_checkpoint(downloaded, tags.get(MANIFEST_TAG))
        for file in list(downloaded.iterdir()):
            file.rename(partial / file.name)
        for parent in (downloaded, *downloaded.parents):
            if parent == partial:
                break
            parent.rmdir()


def alias_version(uri: str, name: str, alias: str) -> str | None:
    """Version that an alias of a registered model points to; None if the alias does not exist.

    Raises:
        ConfigError: the registry does not answer.
    """
    with explained(uri):
        try:
            return str(MlflowClient(uri).get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            # MLflow reports a missing alias as an invalid value, a missing model as one that does not exist.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def move_alias(
    uri: str,
    name: str,
    alias: str,
    expected: str | None,
    version: str,
    remember: bool = True,
    tags: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Point an alias to another version, unless it was moved since that was decided.

    MLflow cannot compare and set. The lock is a registered model: creating one whose name exists fails on every store.
    It is held for the two requests that read and write the alias.

    Args:
        uri: tracking server.
        name: registered model.
        alias: alias to move.
        expected: version that it must point to before; None if it must not exist.
        version: version to point to.
        remember: tag the new version with the one it replaced, for a rollback.
        tags: further tags of the new version.

    Raises:
        PromotionError: another job moved the alias, or holds the lock.
        ConfigError: the registry does not answer.
    """
    lock = f"{name}--{alias}-is-moved"
    client = MlflowClient(uri)
    with explained(uri):
        try:
            client.create_registered_model(lock)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            raise PromotionError(
                f"alias '{alias}' of '{name}' is being moved by another job; run again. If no job is"
                f" running, one was killed: delete the registered model '{lock}'"
            ) from error
        try:
            current = alias_version(uri, name, alias)
            if current != expected:
                raise PromotionError(
                    f"alias '{alias}' of '{name}' was moved from version {expected} to {current} in the meantime;"
                    " run again"
                )
            replaced = {REPLACED_TAG: expected} if remember and expected is not None else {}
            for key, value in {**replaced, **tags}.items():
                client.set_model_version_tag(name, version, key, value)
            client.set_registered_model_alias(name, alias, version)
        finally:
            client.delete_registered_model(lock)


def replaced_version(uri: str, name: str, version: str) -> str | None:
    """Version that this one replaced under an alias; None if it was the first."""
    with explained(uri):
        return MlflowClient(uri).get_model_version(name, version).tags.get(REPLACED_TAG)


def tag_version(uri: str, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version.

    Raises:
        ConfigError: the registry does not take them.
    """
    with explained(uri):
        for key, value in tags.items():
            MlflowClient(uri).set_model_version_tag(name, version, key, value)


def logged_model_id(uri: str, name: str, version: str) -> str | None:
    """The logged model behind a version, which holds its metrics; None for versions of other software.

    Raises:
        ConfigError: the registry does not answer.
    """
    with explained(uri):
        registered = MlflowClient(uri).get_model_version(name, version)
    # Databases do not store the model's id with the version, only its location.
    source = str(registered.source or "")
    model_id = registered.model_id or (source.removeprefix(SCHEME) if source.startswith(f"{SCHEME}m-") else None)
    return model_id or None
