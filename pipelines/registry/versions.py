"""MLflow: the one module that talks to it. Runs, metrics, registered versions and aliases.

The tracking server is that of `MLFLOW_TRACKING_URI`; without it, an SQLite database beside the outputs.
"""

import os
import platform
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own patience with a server that is down is minutes for each request.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT
from ray.train import UserCallback

from longclip.checkpoint import MANIFEST, Checkpoint, load_checkpoint, verify_checkpoint
from longclip.errors import CheckpointError, ConfigError, PromotionError, one_line
from longclip.files import file_sha256, whole_directory
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG, ModelUri, parse_model_uri
from pipelines.common.events import report, warn
from pipelines.common.plots import Line, line_plot

CHECKPOINT = CHECKPOINT_ARTIFACT.rpartition("/")[2]
REPLACED_TAG = "replaced_version"
"""Tag of a version: the version that it replaced under an alias."""

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
CARD = "README.md"
PACKAGES = ("longclip", "torch", "transformers", "ray", "mlflow", "numpy", "pyarrow", "safetensors", "tokenizers")
WAITING_METRICS, METRICS_A_REQUEST = 100_000, 500
"""Metrics that are kept while MLflow does not answer, and that go into a request."""
CURVES = ("_loss", "learning_rate", "gradient_norm", "retained_variance")
PYFUNC_MODEL = Path(__file__).with_name("pyfunc_model.py")


def configured_uri() -> str | None:
    """The tracking server of `MLFLOW_TRACKING_URI`, if it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def tracking_uri(beside: str | Path) -> str:
    """Where runs are recorded: the configured server, or `mlflow.db` in the directory `beside`."""
    if configured := configured_uri():
        return configured
    directory = Path(beside).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{directory / DATABASE}"


def start_run(uri: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> str:
    """Begin a run with its flattened parameters, the environment and the commit it runs in; return its id.

    Raises:
        ConfigError: the tracking server cannot be reached.
    """
    with _answering(uri):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, _artifact_location(uri))
        run = client.create_run(experiment_id, run_name=name)
        for key, value in _flatten(parameters).items():
            client.log_param(run.info.run_id, key, value)
        client.log_dict(run.info.run_id, dict(parameters), "settings.json")
        client.log_dict(run.info.run_id, environment(), "environment.json")
        if commit := git_commit():
            client.set_tag(run.info.run_id, MLFLOW_GIT_COMMIT, commit)
    return run.info.run_id


def environment() -> dict[str, Any]:
    """What this process runs on, and with: versions of the packages that results depend on."""
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    packages = {name: installed[name] for name in PACKAGES if name in installed}  # a submitted job is not installed
    return {"python": platform.python_version(), "machine": platform.platform(), "packages": packages}


def git_commit() -> str | None:
    """Commit of this code, with `-changed` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=-changed"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def end_run(uri: str, run_id: str, succeeded: bool) -> None:
    """Close a run as finished or failed, with a plot of what it reported.

    What the run made is there whether MLflow answers or not: if it does not, a warning says so.
    """
    client = MlflowClient(uri)
    try:
        names = [name for name in client.get_run(run_id).data.metrics if name == "loss" or name.endswith(CURVES)]
        curves = {
            name: [Line(name, [(point.step, point.value) for point in client.get_metric_history(run_id, name)])]
            for name in names
        }
        if plot := line_plot(curves, "step"):
            client.log_text(run_id, plot, "curves.svg")
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")
    except MlflowException as error:
        warn(f"MLflow does not take the end of run {run_id}: {one_line(error, 200)}")


class MetricsToMlflow(UserCallback):
    """Records what the workers report, from the one process that controls the training, and shows progress.

    Training goes on when MLflow does not answer. That is said once on stderr, and what was reported meanwhile is sent
    when it answers again; after the last step there is some patience with it, and what it never took is said, too.
    """

    LAST_SECONDS, PAUSE_SECONDS = 300.0, 5.0

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.waiting: deque[Metric] = deque(maxlen=WAITING_METRICS)
        self.failed = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log the metrics of rank 0, which are averages over all workers."""
        reported = dict(metrics[0])
        step, total = int(reported.pop("step")), int(reported.pop("total_steps"))
        loss, speed = reported["loss"], reported["pairs_per_second"]
        parts = ", ".join(f"{name} {value:.3f}" for name, value in reported.items() if name.endswith("_loss"))
        left = (total - step) * reported["batch_seconds"]
        report(f"step {step}/{total}: loss {loss:.3f} ({parts}), {speed:.0f} pairs/s, {left:.0f} s left")
        now = int(1000 * time.time())
        self.waiting += [Metric(_metric_name(name), value, now, step) for name, value in reported.items()]
        self._send()
        deadline = time.monotonic() + self.LAST_SECONDS
        while step == total and self.waiting and time.monotonic() < deadline:
            time.sleep(self.PAUSE_SECONDS)
            self._send()
        if step == total and self.waiting:
            warn(f"MLflow did not take {len(self.waiting)} metrics of run {self.run_id}, and they are lost")

    def _send(self) -> None:
        """Send what waits, as far as MLflow takes it."""
        try:
            while self.waiting:
                batch = list(islice(self.waiting, METRICS_A_REQUEST))
                MlflowClient(self.uri).log_batch(self.run_id, metrics=batch)
                for _ in batch:
                    self.waiting.popleft()
        except MlflowException as error:
            if not self.failed:
                warn(f"MLflow does not take metrics, training goes on and sends them later: {one_line(error, 200)}")
            self.failed = True


def register_checkpoint(
    uri: str, directory: Path, name: str, experiment: str, metrics: Mapping[str, float], alias: str, card: str = ""
) -> int:
    """Register a checkpoint directory as a new version of a model and point an alias at it.

    Args:
        uri: tracking server.
        directory: Hugging Face directory whose last part is `checkpoint`; its files are logged unchanged.
        name: registered model.
        experiment: experiment of the run that carries the version.
        metrics: figures to record with it.
        alias: `candidate` or `champion`.
        card: model card in Markdown, kept beside the checkpoint and as the version's description.

    Returns:
        The version number.
    """
    verify_checkpoint(directory)
    checkpoint: Checkpoint = load_checkpoint(directory)
    if directory.name != CHECKPOINT:
        raise CheckpointError(f"checkpoint '{directory}': a registered directory must be called '{CHECKPOINT}'")
    run_id = start_run(uri, experiment, f"register-{name}", {"checkpoint": str(directory)})
    mlflow.set_tracking_uri(uri)
    example = ["a photo of a dog that runs along a beach"]
    with mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CARD).write_text(card)
        mlflow.log_metrics({_metric_name(key): value for key, value in metrics.items()})
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
    """A registered version, free of anything that can move."""

    uri: str
    """`models:/name/version`."""
    source: str
    """Where its artifacts lie: tells equal names and versions of two registries apart."""


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
    """Download the checkpoint of a registered version, and nothing else of it, to `directory`, which is new.

    Its files are checked against their manifest, and that against the checksum that the registry keeps.

    Args:
        uri: tracking server.
        model: `models:/name/version`.
        directory: what the checkpoint will be called; it is there whole or not at all.

    Raises:
        CheckpointError: the artifacts cannot be read, or are not what was registered.
    """
    registered = parse_model_uri(model)
    artifacts = f"{model}/{CHECKPOINT_ARTIFACT}"
    with whole_directory(directory) as aside:
        try:
            tags = MlflowClient(uri).get_model_version(registered.name, registered.version).tags
            found = mlflow.artifacts.download_artifacts(artifact_uri=artifacts, dst_path=str(aside), tracking_uri=uri)
        except (MlflowException, OSError) as error:
            raise CheckpointError(f"'{artifacts}' cannot be downloaded: {one_line(error, 200)}") from error
        downloaded = Path(found)
        verify_checkpoint(downloaded, tags.get(MANIFEST_TAG))
        for file in list(downloaded.iterdir()):
            file.rename(aside / file.name)
        for parent in (downloaded, *downloaded.parents):
            if parent == aside:
                break
            parent.rmdir()


def alias_version(uri: str, name: str, alias: str) -> str | None:
    """Version that an alias of a registered model points at; None where it points nowhere.

    Raises:
        ConfigError: the registry does not answer.
    """
    with _answering(uri):
        try:
            return str(MlflowClient(uri).get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            # A missing alias is said as an invalid value, a missing model as one that does not exist.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def move_alias(uri: str, name: str, alias: str, expected: str | None, version: str, remember: bool = True) -> None:
    """Point an alias at another version, if it still points where it did when that was decided.

    MLflow has no such operation. Creating a registered model of a name that exists fails, on every store: that
    is the lock, which is held for the two requests between reading and writing.

    Args:
        uri: tracking server.
        name: registered model.
        alias: what is moved.
        expected: version that it must point at until then; None for nowhere.
        version: version that it will point at.
        remember: tag the new version with the one it replaced, for a way back.

    Raises:
        PromotionError: the alias was moved by somebody else, or somebody else holds the lock.
        ConfigError: the registry does not answer.
    """
    lock = f"{name}--{alias}-is-moved"
    client = MlflowClient(uri)
    with _answering(uri):
        try:
            client.create_registered_model(lock)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            raise PromotionError(
                f"alias '{alias}' of '{name}' is being moved by another job; run this one again. If there is none, one"
                f" was killed: delete the registered model '{lock}'"
            ) from error
        try:
            found = alias_version(uri, name, alias)
            if found != expected:
                raise PromotionError(
                    f"alias '{alias}' of '{name}' was moved from version {expected} to {found} meanwhile; run again"
                )
            if remember and expected is not None:
                client.set_model_version_tag(name, version, REPLACED_TAG, expected)
            client.set_registered_model_alias(name, alias, version)
        finally:
            client.delete_registered_model(lock)


def replaced_version(uri: str, name: str, version: str) -> str | None:
    """Version that this one replaced under an alias; None where it was the first."""
    with _answering(uri):
        return MlflowClient(uri).get_model_version(name, version).tags.get(REPLACED_TAG)


def log_documents(uri: str, run_id: str, documents: Mapping[str, str]) -> None:
    """Keep texts, by file name, as artifacts of a run.

    Raises:
        ConfigError: the tracking server or its storage does not take them.
    """
    with _answering(uri):
        client = MlflowClient(uri)
        for file, text in documents.items():
            client.log_text(run_id, text, file)


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        reason = one_line(error, 200)
        raise ConfigError(f"MLflow at '{uri}' cannot be used: {reason}; check MLFLOW_TRACKING_URI") from error


def _artifact_location(uri: str) -> str | None:
    """Beside the database for SQLite, whose own default is the current directory; the server's choice otherwise."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).parent / ARTIFACTS)


def _metric_name(name: str) -> str:
    """MLflow takes names with slashes but no '@'."""
    return name.replace("@", "_at_")


def _flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
