"""ONNX graphs of both towers, for serving without torch.

The graphs hold no weights. They refer to the `model.safetensors` next to them, by the offsets in its header. So the
directory is also a complete Hugging Face checkpoint, bit for bit, and hardly larger than one.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from longclip.checkpoint import Checkpoint, write_checkpoint_files
from longclip.errors import CheckpointError, ConfigError

TEXT_GRAPH, IMAGE_GRAPH = "text.onnx", "image.onnx"
TOLERANCE = 1e-4
"""Largest allowed difference between unit embeddings of onnxruntime and of torch."""

_WEIGHTS = "model.safetensors"
_LEAST_LENGTH = 2  # start and end token
_PREFIX = "clip."


class _Tower(nn.Module):
    """A tower that returns unit embeddings, with the names of its graph, input and output."""

    graph: str
    input_name: str
    output_name: str

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip


class _TextTower(_Tower):
    """`[n, l]` token ids to `[n, D]`."""

    graph, input_name, output_name = TEXT_GRAPH, "input_ids", "text_embeds"

    def forward(self, input_ids: Tensor) -> Tensor:
        return normalize(self.clip.get_text_features(input_ids=input_ids).pooler_output, dim=-1)


class _ImageTower(_Tower):
    """`[n, 3, S, S]` normalised pixels to `[n, D]`."""

    graph, input_name, output_name = IMAGE_GRAPH, "pixel_values", "image_embeds"

    def forward(self, pixel_values: Tensor) -> Tensor:
        return normalize(self.clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


def write(checkpoint: Checkpoint, directory: Path) -> str:
    """Write a checkpoint and the graphs of its towers, and compare their results with torch.

    `text.onnx` takes `input_ids [n, l]` int64, texts of any number and of 2 tokens up to the context length, and gives
    `text_embeds [n, D]`. Padding after the end token, with any token, changes nothing. `image.onnx` takes
    `pixel_values [n, 3, S, S]` float32 and gives `image_embeds [n, D]`. Embeddings have unit length.

    Returns:
        How to load it.

    Raises:
        ConfigError: the packages of the extra `onnx` are not installed.
        CheckpointError: results of onnxruntime and torch differ.
    """
    runtime = _runtime()
    write_checkpoint_files(checkpoint, directory, {"origin": "export"})
    places = _tensor_places(directory / _WEIGHTS)
    model, longest = checkpoint.model, checkpoint.context_length
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=_LEAST_LENGTH, max=longest)
    text, image = _TextTower(model).eval(), _ImageTower(model).eval()
    _write_graph(text, directory, places, _texts(model, 2, 16), {0: batch, 1: length})
    _write_graph(image, directory, places, _images(model, 2), {0: batch})
    _compare(runtime, text, directory, [_texts(model, 3, longest), _texts(model, 1, _LEAST_LENGTH)])
    _compare(runtime, image, directory, [_images(model, 3), _images(model, 1)])
    return f'onnxruntime.InferenceSession("{{path}}/{TEXT_GRAPH}"), and {IMAGE_GRAPH}'


def _runtime() -> Callable[[str], Any]:
    """`onnxruntime.InferenceSession`, after checking that all packages for the export are installed."""
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ConfigError(
            f"format 'onnx' needs {error.name}, which is not installed; install it with `pip install 'longclip[onnx]'`"
        ) from error
    del onnx_ir, onnxscript
    return onnxruntime.InferenceSession


def _texts(model: CLIPModel, rows: int, length: int) -> Tensor:
    """`[rows, length]` random token ids; each text ends with the end token."""
    end = model.config.text_config.vocab_size - 1
    input_ids = torch.randint(end, (rows, length), generator=torch.Generator().manual_seed(0))
    input_ids[:, -1] = end
    return input_ids


def _images(model: CLIPModel, rows: int) -> Tensor:
    """`[rows, 3, S, S]` random pixels."""
    side = model.config.vision_config.image_size
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


class _Place(NamedTuple):
    """Location of a tensor in a file: offset and size in bytes, and its shape."""

    offset: int
    size: int
    shape: list[int]


def _tensor_places(weights: Path) -> dict[str, _Place]:
    """Locations of all tensors in a safetensors file, by name."""
    with open(weights, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        places[name] = _Place(8 + header_size + start, end - start, entry["shape"])
    return places


def _write_graph(
    tower: _Tower, directory: Path, places: Mapping[str, _Place], example: Tensor, sizes: Mapping[int, Any]
) -> None:
    import onnx_ir

    with _quiet():
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            input_names=[tower.input_name],
            output_names=[tower.output_name],
            dynamic_shapes={tower.input_name: sizes},
            optimize=False,  # it would store transposed copies of weights, which onnxruntime makes itself
            verbose=False,
        )
    assert program is not None
    for name, value in program.model.graph.initializers.items():
        tensor, place = value.const_value, places.get(name.removeprefix(_PREFIX))
        if tensor is not None and place is not None:  # other buffers stay in the graph
            shape = onnx_ir.Shape(place.shape)
            value.const_value = onnx_ir.ExternalTensor(
                _WEIGHTS, place.offset, place.size, tensor.dtype, shape=shape, name=name, base_dir=directory
            )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths of this machine
    onnx_ir.save(program.model, directory / tower.graph)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's hints at optional packages and its own deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _compare(runtime: Callable[[str], Any], tower: _Tower, directory: Path, inputs: list[Tensor]) -> None:
    session = runtime(str(directory / tower.graph))
    for example in inputs:
        (actual,) = session.run(None, {tower.input_name: example.numpy()})
        with torch.no_grad():
            difference = float(np.abs(actual - tower(example).numpy()).max())
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{tower.graph}: onnxruntime's embeddings of {tuple(example.shape)} differ from torch's by"
                f" {difference:.2g}, more than {TOLERANCE:g}"
            )
