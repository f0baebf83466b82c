"""Typed settings of an entry: defaults < a recipe < one YAML file < `--set a.b=value`.

Fields document themselves: the string under a field is its line in `--help`. A value is read by the type of its field,
never by what YAML would make of it: where a text is expected, `007`, `no` and `/data/run #1` are texts.
"""

import argparse
import difflib
import json
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
        " ([a, b], {a: 1}), null unsets an optional setting",
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError(f"unknown option '{unknown[0]}'; settings are given as --set KEY=VALUE, see --help")
    values = read_settings_file(kind, "--config", arguments.config) if arguments.config else {}
    overrides: dict[str, Any] = {}
    for override in arguments.overrides:
        _apply_override(kind, overrides, override)
    settings = validate(kind, kind.with_presets(merged(values, overrides)))
    print("settings:", *yaml.safe_dump(dump(settings), sort_keys=False).splitlines(), sep="\n  ", flush=True)
    return settings


def dump(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON-like values."""
    return settings.model_dump(mode="json")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` where both have them."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
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
        ConfigError: the file cannot be read, is not YAML, is not a mapping, or has a key twice.
    """
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{option} '{path}' cannot be read: {error.strerror}; give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} '{path}' is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{option} '{path}' is not a mapping of settings; write lines such as output: /data/run1")
    try:
        return _read_node(node, kind)
    except ConfigError as error:
        raise ConfigError(f"{option} '{path}': {error}") from error


def validate(kind: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Settings of nested values.

    Raises:
        ConfigError: in one line, every problem that there is.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(_explain(kind, each) for each in error.errors()))) from error


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


def _apply_override(kind: type[Settings], values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set '{override}' is not KEY=VALUE; write for example --set optim.learning_rate=1e-5")
    *parents, leaf = key.split(".")
    for number, name in enumerate(parents):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            group = ".".join(parents[: number + 1])
            raise ConfigError(f"--set '{override}': '{group}' was set to a single value, not to a group of settings")
    try:
        value = _read_text(text, _annotation_of(kind, key))
    except ConfigError as error:
        raise ConfigError(f"--set '{override}': {error}") from error
    if isinstance(values.get(leaf), dict) and not isinstance(value, dict):
        raise ConfigError(f"--set '{override}': '{key}' is a group of settings, of which another --set gives a value")
    values[leaf] = merged(values[leaf], value) if isinstance(values.get(leaf), dict) else value


def _read_text(text: str, annotation: Any) -> Any:
    """A value of the command line: to the letter, except lists and mappings, which are YAML."""
    if text in NULLS and _is_optional(annotation):
        return None
    options = _options(annotation)
    nested = any(_nested_settings(option) or _origin(option) in (*COLLECTIONS, Any) for option in options)
    if not nested or not text.startswith(("[", "{")):
        return _untyped(text) if Any in options else text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not valid YAML: {' '.join(str(error).split())}") from error
    assert node is not None  # the text begins with a bracket
    if rest := text[node.end_mark.index :].strip():
        raise ConfigError(f"'{rest}' follows the value; quote texts that contain '#'")
    return _read_node(node, annotation)


def _read_node(node: Any, annotation: Any) -> Any:
    """What a YAML node says to a field of this type. Scalars stay texts, which pydantic converts."""
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in _items(node):
            key = str(key_node.value)
            if key in values:
                raise ConfigError(f"line {key_node.start_mark.line + 1} gives '{key}' a second time; keep one")
            values[key] = _read_node(value_node, _annotation_of(annotation, key))
        return values
    if isinstance(node, yaml.SequenceNode):
        inner = next((typing.get_args(o) for o in _options(annotation) if _origin(o) in COLLECTIONS), ())
        return [_read_node(item, inner[0] if inner else Any) for item in node.value]
    if node.style is not None:  # quoted: a text, whatever it looks like
        return node.value
    untyped = Any in _options(annotation)
    if node.value in (*NULLS, "") and (untyped or _is_optional(annotation)):
        return None
    return _untyped(node.value) if untyped else node.value


def _items(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"line {key.start_mark.line + 1} has a merge key (<<); write the values out")
        yield key, value


def _untyped(text: str) -> Any:
    """A scalar where no type is known: a number, boolean or null as JSON writes them, a text otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _annotation_of(annotation: Any, key: str) -> Any:
    """Type of the setting at a dotted key below a type; `str` where there is none, which validation will say."""
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
            return str
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
        known = list(documented(kind))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"unknown setting '{key}'; {hint}"
    if problem["type"] == "missing":
        return f"setting '{key}' is missing; give it in the YAML file or as --set {key}=..."
    group = _nested_settings(_annotation_of(kind, key)) if key else None
    if group and problem["type"] in ("model_type", "model_attributes_type"):
        names = ", ".join(f"{key}.{name}" for name in group.model_fields)
        return f"setting '{key}' = {problem['input']!r} is a group of settings; set one of {names}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"setting '{key}' = {problem['input']!r}: {message}" if key else message


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
