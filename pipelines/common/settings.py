"""Typed settings of an entry: defaults < one YAML file < `--set a.b=value`.

Fields document themselves: the string under a field is its line in `--help`. An unknown key is an error that names the
nearest one that exists.
"""

import argparse
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from longclip.errors import ConfigError

SETTINGS_FILE = "settings.yaml"
JOB_PACKAGE = "working_dir_files"
"""Part of the path in which Ray unpacks the working directory of a submitted job."""


class Settings(BaseModel):
    """Base of all settings: no unknown keys, immutable, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_settings(kind: type[SettingsT], description: str, argv: Sequence[str] | None = None) -> SettingsT:
    """Parse the command line of an entry, print the resolved settings and return them.

    Raises:
        ConfigError: a file, key or value is wrong; `--help` and malformed options leave through argparse.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"settings (with their defaults):\n{describe(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="one setting; beats the file"
    )
    parser.add_argument("--KEY", metavar="VALUE", dest="_", help="the same as --set KEY=VALUE; dashes are underscores")
    arguments, others = parser.parse_known_args(argv)
    values: dict[str, Any] = _read_file(arguments.config) if arguments.config else {}
    for override in [*arguments.overrides, *_long_options(others)]:
        _apply_override(values, override)
    settings = _validate(kind, values)
    print("settings:", *yaml.safe_dump(dump(settings), sort_keys=False).splitlines(), sep="\n  ", flush=True)
    return settings


def dump(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON-like values."""
    return settings.model_dump(mode="json")


def describe(kind: type[Settings]) -> str:
    """One line per setting: key, default, meaning."""
    return "\n".join(f"  {key} = {default}\n      {text}" for key, default, text in _describe_fields(kind))


def claim_directory(
    field: str, directory: Path, settings: SettingsT, identity: Callable[[SettingsT], dict[str, Any]]
) -> None:
    """Write the settings of a run into its directory, where the same ones go on: others would mix two runs.

    Args:
        field: setting that names the directory.
        directory: made where it does not exist.
        settings: of this run.
        identity: what the result depends on, of settings.

    Raises:
        ConfigError: it holds a run whose result would be another one.
    """
    path = directory / SETTINGS_FILE
    if path.is_file():
        theirs = identity(type(settings).model_validate(yaml.safe_load(path.read_text())))
        ours = identity(settings)
        if theirs != ours:
            different = sorted(key for key in ours if theirs[key] != ours[key])
            raise ConfigError(
                f"{field}='{directory}' holds a run with other settings ({', '.join(different)}); choose another"
                f" {field}, or remove that directory to start again"
            )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dump(settings), sort_keys=False))


def storage_path(field: str, value: str) -> str:
    """A path that every process of a cluster understands: URIs as they are, local paths made absolute.

    A submitted job runs in a temporary copy of its working directory. A relative path there would vanish with it, so it
    is refused.

    Raises:
        ConfigError: the path is empty, or relative inside a submitted job.
    """
    if not value:
        raise ConfigError(f"{field} is empty; give a path, e.g. --set {field}=/data/train")
    if "://" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_absolute() and JOB_PACKAGE in os.getcwd():
        raise ConfigError(
            f"{field}='{value}' is relative, but a submitted job runs in a temporary copy of its working directory;"
            f" give an absolute path or a URI, e.g. --set {field}=$PWD/{value}"
        )
    return str(path.absolute())


def _long_options(arguments: Sequence[str]) -> Iterator[str]:
    """`key=value` of options such as `--some-key value` and `--some-key=value`."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, separator, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key or not (separator or rest):
            raise ConfigError(f"'{option}' is no setting; write --set KEY=VALUE or --KEY VALUE, see --help")
        yield f"{key.replace('-', '_')}={value if separator else rest.pop(0)}"


def _read_file(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(name).read_text())
    except OSError as error:
        raise ConfigError(f"--config '{name}' cannot be read: {error.strerror}; give an existing YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config '{name}' is no YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"--config '{name}' holds {type(values).__name__}, expected a mapping of settings")
    return values or {}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set '{override}' is no KEY=VALUE; write for example --set optim.learning_rate=1e-5")
    *parents, leaf = key.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set '{override}': '{name}' is a single value, not a group of settings")
    try:
        values[leaf] = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        values[leaf] = text


def _validate(kind: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, problem) for problem in error.errors())) from error


def _explain(kind: type[Settings], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = [name for name, _, _ in _describe_fields(kind)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"unknown setting '{key}'; {hint}"
    if problem["type"] == "missing":
        return f"setting '{key}' is missing; give it in the YAML file or as --set {key}=..."
    message = problem["msg"].removeprefix("Value error, ")
    return f"setting '{key}' = {problem['input']!r}: {message}" if key else message


def _describe_fields(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in kind.model_fields.items():
        nested = _nested_settings(field.annotation)
        if nested:
            yield from _describe_fields(nested, f"{prefix}{name}.")
        else:
            default = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, str(default), " ".join((field.description or "").split())


def _nested_settings(annotation: Any) -> type[Settings] | None:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_nested_settings(option) for option in typing.get_args(annotation)]
        return next((option for option in found if option), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None
