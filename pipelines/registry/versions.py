"""Registered versions in MLflow: registration, aliases and downloads."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from longclip.errors import CheckpointError, PromotionError, one_line
from longclip.files import MANIFEST, file_sha256, whole_directory
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG, ModelUri, parse_model_uri
from pipelines.registry.runs import metric_name, start_run
from pipelines.registry.server import explained

CHECKPOINT = CHECKPOINT_ARTIFACT.rpartition("/")[2]
REPLACED_TAG = "replaced_version"
"""Tag of a version: the version that it replaced under an alias."""

CARD = "README.md"
PYFUNC_MODEL = Path(__file__).with_name("pyfunc_model.py")


def register_checkpoint(
    uri: str, directory: Path, name: str, experiment: str, metrics: Mapping[str, float], alias: str, card: str = ""
) -> int:
    """Register a checkpoint directory as a new version of a model and point an alias at it.

    Args:
        uri: tracking server.
        directory: Hugging Face directory whose last part is `checkpoint`; its files are stored unchanged.
        name: registered model.
        experiment: experiment of the run that carries the version.
        metrics: metrics to record with it.
        alias: `candidate` or `champion`.
        card: model card in Markdown, stored next to the checkpoint and as the version's description.

    Returns:
        The version number.
    """
    from longclip.checkpoint import (  # loads torch, which moving an alias does not need
        load_checkpoint,
        verify_checkpoint,
    )

    verify_checkpoint(directory)
    checkpoint = load_checkpoint(directory)
    if directory.name != CHECKPOINT:
        raise CheckpointError(f"checkpoint '{directory}': a registered directory must be called '{CHECKPOINT}'")
    run_id = start_run(uri, experiment, f"register-{name}", {"checkpoint": str(directory)})
    mlflow.set_tracking_uri(uri)
    example = ["a photo of a dog that runs along a beach"]
    with mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CARD).write_text(card)
        mlflow.log_metrics({metric_name(key): value for key, value in metrics.items()})
        logged = mlflow.pyfunc.log_model(
            name="longclip",
            python_model=str(PYFUNC_MODEL),
            artifacts={CHECKPOINT: str(directory)} | ({"card": str(Path(scratch) / CARD)} if card else {}),
            input_example=example,
            pip_requirements=["longclip", "torch", "transformers"],
            metadata={"context_length": checkpoint.context_length},
        )
    tags = {MANIFEST_TAG: file_sha256(directory / MANIFEST)}
    version = mlflow.register_model(f"models:/{logged.model_id}", name, tags=tags)
    client = MlflowClient(uri)
    client.update_model_version(name, version.version, card)
    client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


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


def move_alias(uri: str, name: str, alias: str, expected: str | None, version: str, remember: bool = True) -> None:
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
            if remember and expected is not None:
                client.set_model_version_tag(name, version, REPLACED_TAG, expected)
            client.set_registered_model_alias(name, alias, version)
        finally:
            client.delete_registered_model(lock)


def replaced_version(uri: str, name: str, version: str) -> str | None:
    """Version that this one replaced under an alias; None if it was the first."""
    with explained(uri):
        return MlflowClient(uri).get_model_version(name, version).tags.get(REPLACED_TAG)
