"""Runs in MLflow: parameters, environment, documents, metrics, and a plot of the metrics."""

import getpass
import platform
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage, LoggedModelInput, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_USER

from longclip.errors import one_line
from pipelines.common.events import warn
from pipelines.common.plots import Line, line_plot
from pipelines.common.settings import flattened
from pipelines.registry.server import explained

ARTIFACTS = "mlartifacts"
PACKAGES = ("longclip", "torch", "transformers", "ray", "mlflow", "numpy", "pyarrow", "safetensors", "tokenizers")
MAX_PENDING_METRICS, METRICS_PER_REQUEST = 100_000, 500
CURVES = ("_loss", "learning_rate", "gradient_norm", "retained_variance")


def start_run(uri: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> str:
    """Start a run with its flattened parameters, the environment and the commit it runs in; returns its id.

    Raises:
        ConfigError: the tracking server cannot be reached.
    """
    with explained(uri):
        client = MlflowClient(uri)
        if existing := client.get_experiment_by_name(experiment):
            experiment_id = existing.experiment_id
        else:
            experiment_id = client.create_experiment(experiment, _artifact_location(uri))
        run = client.create_run(experiment_id, run_name=name, tags=_user())
        for key, value in flattened(parameters).items():
            client.log_param(run.info.run_id, key, value)
        client.log_dict(run.info.run_id, dict(parameters), "settings.json")
        client.log_dict(run.info.run_id, environment(), "environment.json")
        if commit := git_commit():
            client.set_tag(run.info.run_id, MLFLOW_GIT_COMMIT, commit)
    return run.info.run_id


def _user() -> dict[str, str]:
    """The tag of the user who started a run; empty in a container whose user has no name."""
    try:
        return {MLFLOW_USER: getpass.getuser()}
    except (KeyError, OSError):
        return {}


def existing_run(uri: str, run_id: str | None) -> Run | None:
    """A run of the tracking server; None if it has no such run, or the run was deleted.

    Raises:
        ConfigError: the tracking server cannot be reached.
    """
    if run_id is None:
        return None
    with explained(uri):
        try:
            run = MlflowClient(uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
    return run if run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def continue_run(uri: str, run_id: str, name: str) -> bool:
    """Mark a run as running, for a job that resumes; returns False if the tracking server has no such run of that name.

    Raises:
        ConfigError: the tracking server cannot be reached.
    """
    run = existing_run(uri, run_id)
    if run is None or run.info.run_name != name:
        return False
    with explained(uri):
        MlflowClient(uri).update_run(run_id, status="RUNNING")
    return True


def environment() -> dict[str, Any]:
    """Python, machine and versions of the packages that results depend on."""
    installed = {package.name.lower(): package.version for package in metadata.distributions()}
    packages = {name: installed[name] for name in PACKAGES if name in installed}  # a submitted job is not installed
    return {"python": platform.python_version(), "machine": platform.platform(), "packages": packages}


def git_commit() -> str | None:
    """Commit of this code, followed by `-changed` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=-changed"]
    try:
        result = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def end_run(uri: str, run_id: str, succeeded: bool) -> None:
    """Close a run as finished or failed, with a plot of its metrics.

    If MLflow does not answer, this prints a warning and raises nothing: the output of the run is complete without it.
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
        warn(f"MLflow did not record the end of run {run_id}: {one_line(error, 200)}")


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run.

    Raises:
        ConfigError: the tracking server does not take them.
    """
    with explained(uri):
        for key, value in tags.items():
            MlflowClient(uri).set_tag(run_id, key, value)


def log_documents(uri: str, run_id: str, documents: Mapping[str, str]) -> None:
    """Store texts as artifacts of a run.

    Args:
        uri: tracking server.
        run_id: run.
        documents: texts by file name.

    Raises:
        ConfigError: the tracking server or its storage rejects them.
    """
    with explained(uri):
        client = MlflowClient(uri)
        for file, text in documents.items():
            client.log_text(run_id, text, file)


def log_models(uri: str, run_id: str, model_ids: Sequence[str]) -> None:
    """Log models as inputs of a run, which shows them on its page.

    Raises:
        ConfigError: the tracking server does not take them.
    """
    with explained(uri):
        MlflowClient(uri).log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in model_ids])


def log_metrics(uri: str, run_id: str, values: Mapping[str, float], model_id: str | None = None) -> None:
    """Log metrics to a run, and to a logged model, whose registered version shows them too.

    Raises:
        ConfigError: the tracking server does not take them.
    """
    now = int(1000 * time.time())
    metrics = [Metric(metric_name(name), value, now, 0, model_id=model_id) for name, value in values.items()]
    with explained(uri):
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            MlflowClient(uri).log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


class MetricLog:
    """Metrics of a run for MLflow: kept while it does not answer, and sent when it does again."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._pending: deque[Metric] = deque(maxlen=MAX_PENDING_METRICS)
        self._warned = False

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the metrics of a step; `send` sends them."""
        now = int(1000 * time.time())
        self._pending += [Metric(metric_name(name), value, now, step) for name, value in values.items()]

    def send(self) -> None:
        """Send all pending metrics; those that MLflow does not take are kept. Only the first failure is printed."""
        try:
            while self._pending:
                batch = list(islice(self._pending, METRICS_PER_REQUEST))
                MlflowClient(self.uri).log_batch(self.run_id, metrics=batch)
                for _ in batch:
                    self._pending.popleft()
        except MlflowException as error:
            if not self._warned:
                warn(f"MLflow does not take metrics; training continues and sends them later: {one_line(error, 200)}")
            self._warned = True


def metric_name(name: str) -> str:
    """A name that MLflow accepts: it allows slashes but not '@'."""
    return name.replace("@", "_at_")


def _artifact_location(uri: str) -> str | None:
    """Next to the database for SQLite, whose default would be the current directory; None leaves it to the server."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).parent / ARTIFACTS)
