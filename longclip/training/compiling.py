"""Compiled layers: `torch.compile`, once for all layers of a tower, for texts of any length.

Micro-batches of texts have many different lengths. So the number of rows and the length are symbolic in a layer's
graph, and nothing is padded for the compiler. Layers of a tower share their graphs. There is one for each tower and
each way to run it (with and without gradients, in training and evaluation mode), and a few more for shapes that torch
specialises, such as a single row.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPModel

MAX_GRAPHS = 32
"""Maximum graphs of a layer. torch's default of 8, which counts both towers together, is too low."""


def compile_layers(model: CLIPModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile all but the last layer of both towers, in place, at their first use. Results are equal up to rounding.

    Parameter names do not change. The last layer of a tower is computed for one row only (`longclip.encode`) and is not
    compiled. Call this before sharding.

    Args:
        model: the CLIP.
        backend: of `torch.compile`; `inductor` needs a C++ compiler, or Triton on a GPU.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers[:-1]:
            layer.compile(backend=backend, fullgraph=True, dynamic=True)
