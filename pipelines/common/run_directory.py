"""The directory of a run: it holds the run's settings, so that a run with others does not mix into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from longclip.errors import ConfigError
from pipelines.common.settings import SettingsT, dump

SETTINGS_FILE = "settings.yaml"


def claim_directory(
    field: str, directory: Path, settings: SettingsT, identity: Callable[[SettingsT], dict[str, Any]]
) -> None:
    """Write the settings of a run into its directory, unless a different run is there.

    Args:
        field: setting that names the directory.
        directory: created if it does not exist.
        settings: of this run.
        identity: the part of the settings that the result depends on.

    Raises:
        ConfigError: the directory holds a run whose result would differ.
    """
    path = directory / SETTINGS_FILE
    if path.is_file():
        before = identity(type(settings).model_validate(yaml.safe_load(path.read_text())))
        now = identity(settings)
        if before != now:
            different = sorted(key for key in now if before[key] != now[key])
            raise ConfigError(
                f"{field}='{directory}' holds a run with other settings ({', '.join(different)}); choose another"
                f" {field}, or remove that directory to start over"
            )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dump(settings), sort_keys=False))
