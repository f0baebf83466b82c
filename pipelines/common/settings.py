"""Typed settings of an entry: defaults < a recipe < one YAML file < `--set a.b=value`.

Fields document themselves: the string under a field is its line in `--help`. A value is read by the type of its field,
never by what YAML would make of it: where a text is expected, `007`, `no` and `/data/run #1` are texts.
"""

import argparse
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from longclip.errors import ConfigError

COLLECTIONS = (list, tuple, set, dict)
NULLS = ("null", "~")
YAML_TAG = "tag:yaml.org,2002:"
CONSTANTS = {"~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,99})")
DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?", re.IGNORECASE)
LIKE_A_NUMBER = re.compile(r"[-+]?(\d+|[\d.]+e[-+]?\d+|\.?(inf|infinity|nan))", re.IGNORECASE)
MAX_DEPTH = 50
MAX_ECHO = 200


class Whole(dict[str, Any]):
    """A mapping that replaces the one below it: the value of a `dict[...]` setting, not a group of settings."""


class Settings(BaseModel):
    """Base of all settings: no unknown keys, immutable, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def with_presets(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values with the presets that they name below them; those of a subclass that has presets."""
        return values


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_settings(kind: type[SettingsT], description: str, argv: Sequence[str] | None = None) -> SettingsT:
    """Parse the command line of an entry, print the resolved settings and return them.

    Raises:
        ConfigError: a file, key or value is wrong; `--help` and malformed options leave through argparse.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"settings, with their defaults:\n\n{describe(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="one setting; overrides the file. Texts are taken to the letter, lists and mappings as YAML"
        " ([a, b], {a: 1}), null unsets an optional setting. A mapping for a group of settings merges into the"
        " file's group; for any other setting it replaces the file's mapping",
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError(f"unknown option '{unknown[0]}'; settings are given as --set KEY=VALUE, see --help")
    values = read_settings_file(kind, "--config", arguments.config) if arguments.config is not None else {}
    overrides: dict[str, Any] = {}
    for override in arguments.overrides:
        _apply_override(kind, overrides, override)
    settings = validate(kind, kind.with_presets(merged(values, overrides)))
    print("settings:", *yaml.safe_dump(dump(settings), sort_keys=False).splitlines(), sep="\n  ", flush=True)
    return settings


def dump(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON-like values."""
    return settings.model_dump(mode="json")


def merged(below: dict[str, Any], above: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values, those of `above` where both have them.

    Raises:
        ConfigError: `above` has settings of a group that is a single value in `below`.
    """
    result = dict(below)
    for key, value in above.items():
        old, name = result.get(key), prefix + key
        if old is None or not isinstance(value, dict) or isinstance(value, Whole):
            result[key] = value
        elif isinstance(old, dict):
            result[key] = merged(old, value, f"{name}.")
        else:
            inner = next(iter(flattened(value, f"{name}.")), name)
            raise ConfigError(f"'{inner}' is set, but so is '{name}', to the single value {_echo(old)}; remove one")
    return result


def flattened(values: typing.Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, typing.Mapping) else {prefix + key: value}
    return flat


def read_settings_file(kind: type[Settings], option: str, path: str | Path) -> dict[str, Any]:
    """Values of a YAML file, each as its field reads it.

    Args:
        kind: settings that the file is for.
        option: option or setting that names the file, for messages.
        path: the file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, has a key twice, or has a wrong value.
    """
    source = f"{option} '{path}'"
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}; give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text; save it as UTF-8") from error
    try:
        node = _compose(text)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("the file is not a mapping of settings; write lines such as output: /data/run1")
        values: dict[str, Any] = _read_node(node, kind, ())
        _check_part(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return values


def validate(kind: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Settings of nested values.

    Raises:
        ConfigError: in one line, every problem that there is.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _mistakes(kind, error.errors()) from error


def describe(kind: type[Settings]) -> str:
    """The text of `--help`: two lines per setting (key and default, meaning), by section."""
    lines = []
    for section, text, fields in _sections(kind):
        if section:
            lines.append(f"{section}: {text}")
        for key, default, meaning in fields:
            lines += [f"  {key} = {default}", f"      {meaning}"]
        lines.append("")
    return "\n".join(lines)


def documented(kind: type[Settings]) -> dict[str, str]:
    """What `--help` says of every setting, by its dotted key."""
    return {key: meaning for _, _, fields in _sections(kind) for key, _, meaning in fields}


def _check_part(kind: type[Settings], values: dict[str, Any]) -> None:
    """Check the values of one file by themselves. Another file or --set may give what is missing or contradicts."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        problems = [each for each in error.errors() if each["type"] != "missing" and not _is_about_group(kind, each)]
        if problems:
            raise _mistakes(kind, problems) from error


def _is_about_group(kind: type[Settings], problem: Any) -> bool:
    """Whether a check of a group of settings as a whole failed."""
    key = ".".join(str(part) for part in problem["loc"])
    return problem["type"] == "value_error" and (not key or bool(_nested_settings(_annotation_of(kind, key))))


def _mistakes(kind: type[Settings], problems: Sequence[Any]) -> ConfigError:
    return ConfigError("; ".join(dict.fromkeys(_explain(kind, each) for each in problems)))


def _apply_override(kind: type[Settings], values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    source = f"--set {_echo(override)}"
    *parents, leaf = key.split(".")
    if not separator or not all((*parents, leaf)):
        raise ConfigError(f"{source} is not KEY=VALUE; write for example --set optim.learning_rate=1e-5")
    for number, name in enumerate(parents):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            group = ".".join(parents[: number + 1])
            raise ConfigError(f"{source}: '{group}' was set to a single value, not to a group of settings")
    try:
        value = _read_text(text, _annotation_of(kind, key), key)
        if isinstance(values.get(leaf), dict) and not isinstance(value, dict):
            raise ConfigError(f"'{key}' is a group of settings, of which another --set gives a value")
        values |= merged({leaf: values.get(leaf)}, {leaf: value})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _read_text(text: str, annotation: Any, key: str) -> Any:
    """A value of the command line: to the letter, except lists and mappings, which are YAML."""
    if text in NULLS and _is_optional(annotation):
        return None
    options = _options(annotation)
    nested = any(_nested_settings(option) or _origin(option) in (*COLLECTIONS, Any) for option in options)
    if not nested or not text.startswith(("[", "{")):
        return _untyped(text) if Any in options else text
    node = _compose(text)
    assert node is not None  # the text begins with a bracket
    if rest := text[node.end_mark.index :].strip():
        raise ConfigError(f"{_echo(rest)} follows the value; quote texts that contain '#'")
    return _read_node(node, annotation, (key,))


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ConfigError(f"YAML is nested too deeply; use at most {MAX_DEPTH} levels") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"this is not valid YAML: {' '.join(str(error).split())}") from error


def _read_node(node: Any, annotation: Any, path: tuple[str, ...]) -> Any:
    """What a YAML node says to a field of this type. Scalars stay texts, which pydantic converts."""
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"'{path[0]}' is nested too deeply; use at most {MAX_DEPTH} levels, no alias to itself")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {} if _nested_settings(annotation) else Whole()
        for key, key_node, value_node in _items(node):
            if key in values:
                raise ConfigError(f"line {key_node.start_mark.line + 1} gives '{key}' a second time; keep one")
            values[key] = _read_node(value_node, _annotation_of(annotation, key), (*path, key))
        return values
    if isinstance(node, yaml.SequenceNode):
        inner = next((typing.get_args(o) for o in _options(annotation) if _origin(o) in COLLECTIONS), ())
        item_type = inner[0] if inner else Any
        return [_read_node(item, item_type, (*path, str(number))) for number, item in enumerate(node.value)]
    if node.style is not None:  # quoted: a text, whatever it looks like
        return node.value
    untyped, key = Any in _options(annotation), ".".join(path)
    if node.tag == f"{YAML_TAG}null":
        if not untyped and not _is_optional(annotation):
            raise ConfigError(f"'{key}' is empty; give a value, or quote it if you mean the text")
        return None
    value = _untyped(node.value) if untyped else node.value
    if untyped and isinstance(value, str) and (node.tag != f"{YAML_TAG}str" or LIKE_A_NUMBER.fullmatch(value)):
        raise ConfigError(f"'{key}' = {_echo(value)} is ambiguous; quote it, or write true, false or a decimal number")
    return value


def _items(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    for key, value in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{line} has a list or mapping as a key; write the name of a setting")
        if key.tag == f"{YAML_TAG}merge":
            raise ConfigError(f"{line} has a merge key (<<); write the values out")
        yield str(key.value), key, value


def _untyped(text: str) -> Any:
    """A scalar where no type is known: null, a boolean or a finite decimal number; a text otherwise."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if DECIMAL.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _echo(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_ECHO else f"{text[:MAX_ECHO]}..."


def _annotation_of(annotation: Any, key: str) -> Any:
    """Type of the setting at a dotted key below a type; any text or null where there is none: validation will say."""
    for name in key.split("."):
        below: list[Any] = []
        for option in _options(annotation):
            nested, origin, arguments = _nested_settings(option), _origin(option), typing.get_args(option)
            if option is Any:
                below.append(Any)
            elif nested and name in nested.model_fields:
                below.append(nested.model_fields[name].annotation)
            elif origin is dict:
                below.append(arguments[1] if len(arguments) == 2 else Any)
        if not below:
            return str | None
        annotation = below[0]
    return annotation


def _options(annotation: Any) -> list[Any]:
    """The types of a union, or the one type, without `Annotated` and `None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [option for each in typing.get_args(annotation) for option in _options(each)]
    return [] if annotation is type(None) else [annotation]


def _is_optional(annotation: Any) -> bool:
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_optional(typing.get_args(annotation)[0])
    return type(None) in typing.get_args(annotation)


def _origin(option: Any) -> Any:
    return typing.get_origin(option) or option


def _nested_settings(annotation: Any) -> type[Settings] | None:
    options = [each for each in _options(annotation) if isinstance(each, type) and issubclass(each, Settings)]
    return options[0] if options else None


def _explain(kind: type[Settings], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *groups, name = str(problem["loc"][-1]).split(".")
        if groups:
            nested = "".join(f"{group}: {{" for group in groups) + f"{name}: ...{'}' * len(groups)}"
            return f"unknown setting '{key}'; write {nested}"
        known = list(documented(kind))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"unknown setting {_echo(key)}; {hint}"
    if problem["type"] == "missing":
        return f"setting '{key}' is missing; give it in the YAML file or as --set {key}=..."
    group = _nested_settings(_annotation_of(kind, key)) if key else None
    if group and problem["type"] in ("model_type", "model_attributes_type"):
        names = ", ".join(f"{key}.{name}" for name in group.model_fields)
        return f"setting '{key}' = {_echo(problem['input'])} is a group of settings; set one of {names}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"setting '{key}' = {_echo(problem['input'])}: {message}" if key else message


def _sections(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """(section, what it is, its (key, default, meaning)), the settings outside of any section first."""
    fields, groups = [], []
    for name, field in kind.model_fields.items():
        nested = _nested_settings(field.annotation)
        text = " ".join((field.description or "").split())
        if nested:
            groups.append((f"{prefix}{name}", nested, text or " ".join((nested.__doc__ or "").split())))
        else:
            default = "(required)" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            fields.append((prefix + name, default, text + _choices(field.annotation)))
    yield prefix.rstrip("."), "", fields
    for section, nested, text in groups:
        (_, _, inner), *rest = _sections(nested, f"{section}.")
        yield section, text, inner
        yield from rest


def _shown(default: Any) -> str:
    """A default as a user would write it."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _choices(annotation: Any) -> str:
    """Names that a setting may have, for `--help`."""
    names = [
        str(value)
        for option in _options(annotation)
        if typing.get_origin(option) is typing.Literal
        for value in typing.get_args(option)
    ]
    return f" [{' | '.join(names)}]" if names else ""
