"""The MLflow server: its address, and one-line errors when it does not answer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException

from longclip.errors import ConfigError, one_line

DATABASE = "mlflow.db"


def configured_uri() -> str | None:
    """The tracking server of `MLFLOW_TRACKING_URI`, if it is set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def tracking_uri(directory: str | Path) -> str:
    """Where runs and versions are recorded: the configured server, or the SQLite database in `directory`."""
    if configured := configured_uri():
        return configured
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{directory / DATABASE}"


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn MLflow's errors in the block into a `ConfigError` of one line that names the server."""
    try:
        yield
    except MlflowException as error:
        reason = one_line(error, 200)
        raise ConfigError(f"MLflow at '{uri}' cannot be used: {reason}; check MLFLOW_TRACKING_URI") from error
