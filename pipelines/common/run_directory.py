"""Output directories of jobs: no job replaces what others made, nor mixes its files with those of other settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from longclip.errors import ConfigError
from pipelines.common.settings import SettingsT, dump

SETTINGS_FILE = "settings.yaml"


def refuse_other_output(field: str, output: Path, is_own: Callable[[Path], bool]) -> None:
    """Check that an output may be replaced: it does not exist, is an empty directory, or was made by the same job.

    Args:
        field: setting that names the output.
        output: path of a directory.
        is_own: whether a directory that is not empty was made by this job.

    Raises:
        ConfigError: it was not made by this job.
    """
    if not output.exists() or (output.is_dir() and (not any(output.iterdir()) or is_own(output))):
        return
    raise ConfigError(
        f"{field}='{output}' exists and was not made by this job; choose another {field}, or remove it yourself"
    )


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
