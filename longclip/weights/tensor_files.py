"""Reading tensors from weights files without running any code in them."""

import argparse
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longclip.errors import CheckpointError, one_line

_ZIP, _PICKLE, _LFS_POINTER = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_ONNX = b"\x08"  # field number of the format's version

# What the readers of torch, pickle and zipfile raise for broken or hostile files.
_READ_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)

INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")

_SCALAR = np.float64(0).__reduce__()[0]  # type: ignore[index]
_PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Classes of the options and metrics in training checkpoints; they hold data, and loading them runs no code."""

_STORAGE_TYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors, PyTorch or TorchScript file by their names, on the CPU.

    The first bytes determine the kind of file. A state dict may be nested in `state_dict`, `model_state_dict` or
    `model`, as in training checkpoints; values that are not tensors are ignored. The index of a model in several files
    stands for all of them.

    Raises:
        CheckpointError: the file is none of these, damaged, one of several, or a pickle that holds more than plain
            data.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if shard := _SHARD.search(path.name):
        raise CheckpointError(
            f"it is one of {int(shard[1])} files of a model; give their directory, or the file *{INDEX_SUFFIX} there"
        )
    return _read_file(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: _read_file(index.parent / Path(name).name) for name in sorted(set(files.values()))}
        return {weight: shards[name][weight] for weight, name in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"'{Path(str(error.filename)).name}', which it names, is missing") from error
    except _READ_ERRORS as error:
        raise CheckpointError(f"damaged index, or files that do not fit it: {_one_line(error)}") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(_LFS_POINTER):
        raise CheckpointError("it is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head[8:9] == b"{":
        try:
            return load_file(path)
        except (SafetensorError, *_READ_ERRORS) as error:
            raise CheckpointError(f"damaged or cut off safetensors file: {_one_line(error)}") from error
    if path.suffix == ".onnx" and head.startswith(_ONNX):
        raise CheckpointError("it is an ONNX graph, which names no weights of a CLIP; give the directory of an export")
    if not head.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(f"not a weights file (safetensors, PyTorch or TorchScript); it begins with {head[:16]!r}")
    try:
        return _read_torch(path, is_zip=head.startswith(_ZIP))
    except pickle.UnpicklingError as error:
        # Not torch's message, which advises to switch the protection off.
        raise CheckpointError(
            "it is damaged, or a pickle with Python objects, which is refused because loading one can run any code;"
            " save its state dict alone, best as safetensors"
        ) from error
    except _READ_ERRORS as error:
        raise CheckpointError(f"damaged or cut off PyTorch file: {_one_line(error)}") from error


def _read_torch(path: Path, is_zip: bool) -> dict[str, Tensor]:
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                root, _, file = name.partition("/")
                if file == "constants.pkl":  # only TorchScript has one
                    return dict(_module_tensors(_ModuleUnpickler(archive, f"{root}/").load()))
    with torch.serialization.safe_globals(_PLAIN_DATA):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"it does not hold a state dict but a {type(loaded).__name__}")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


class _Module:
    """Placeholder for a module of a TorchScript archive, of any class: its attributes without its code."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.attributes = state


class _ModuleUnpickler(pickle.Unpickler):
    """Reads the module of a TorchScript archive, which is what OpenAI's downloads are.

    `torch.load(weights_only=True)` does not read these, and `torch.jit.load` runs `__setstate__` of the modules inside,
    written in TorchScript, which can write files (`torch.save`). This reader resolves names only to storage types of
    tensors and to harmless placeholders.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch.jit._pickle":  # typed lists of constants, not weights
            return _no_tensor
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a TorchScript archive")

    def persistent_load(self, identifier: Any) -> Tensor:
        _, dtype, key, _, _ = identifier
        data = bytearray(self._archive.read(f"{self._root}data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _no_tensor(*_: object) -> None:
    return None


def _module_tensors(module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, Tensor):
        yield prefix.removesuffix("."), module
    elif isinstance(module, _Module):
        for name, value in module.attributes.items():
            yield from _module_tensors(value, f"{prefix}{name}.")


def _one_line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__
