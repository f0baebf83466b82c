"""Dataclasses of arrays in one safetensors file: arrays stay arrays, and all else becomes a JSON document."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

DOCUMENT = "document"
"""Array that holds the JSON document as bytes: the header of a safetensors file has a limit that ids can exceed."""

Packed = TypeVar("Packed")


def save_packed(value: Any, path: Path, header: Mapping[str, str]) -> None:
    """Write a dataclass whose fields are arrays, tensors, texts, numbers, None, dataclasses, and dicts and tuples of
    these; the header can be read alone."""
    arrays: dict[str, np.ndarray] = {}
    tuples: dict[tuple[Any, ...], int] = {}
    packed = _pack(value, arrays, tuples)
    document = json.dumps({"value": packed, "tuples": list(tuples)}).encode()
    save_file({**arrays, DOCUMENT: np.frombuffer(document, np.uint8)}, path, dict(header))


def read_header(path: Path) -> dict[str, str]:
    """The header of a file from `save_packed`."""
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def load_packed(kind: type[Packed], path: Path) -> Packed:
    """Read a dataclass of this type from a file of `save_packed`; equal tuples are one object."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    document = json.loads(arrays.pop(DOCUMENT).tobytes())
    return _unpack(kind, document["value"], arrays, [tuple(items) for items in document["tuples"]])


def _pack(value: Any, arrays: dict[str, np.ndarray], tuples: dict[tuple[Any, ...], int]) -> Any:
    if isinstance(value, np.ndarray | torch.Tensor):
        name = f"array_{len(arrays)}"
        arrays[name] = np.ascontiguousarray(value)
        return name
    if is_dataclass(value):
        return {part.name: _pack(getattr(value, part.name), arrays, tuples) for part in fields(value)}
    if isinstance(value, Mapping):
        return {key: _pack(item, arrays, tuples) for key, item in value.items()}
    if isinstance(value, tuple):  # the same long tuple of ids occurs many times
        return tuples.setdefault(value, len(tuples))
    return value


def _unpack(kind: Any, value: Any, arrays: Mapping[str, np.ndarray], tuples: list[tuple[Any, ...]]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        # None, or one of the other types: dataclasses are told apart by their fields.
        options = [option for option in arguments if option is not type(None)]
        fitting = [option for option in options if is_dataclass(option) and _names(option) == set(value or ())]
        kind = (fitting or options)[0]
        return None if value is None else _unpack(kind, value, arrays, tuples)
    if kind is np.ndarray:
        return arrays[value]
    if kind is torch.Tensor:
        return torch.from_numpy(arrays[value])
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _unpack(hints[name], value[name], arrays, tuples) for name in _names(kind)})
    if origin is dict:
        return {key: _unpack(arguments[1], item, arrays, tuples) for key, item in value.items()}
    if origin is tuple:
        return tuples[value]
    return value


def _names(kind: Any) -> set[str]:
    return {part.name for part in fields(kind)}
