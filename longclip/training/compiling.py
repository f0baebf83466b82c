"""Compiled layers: `torch.compile`, once for all layers of a tower, for texts of any length.

Micro-batches of texts have as many lengths as there are texts. So the rows and columns of what enters a layer are
symbols in its graph, and nothing is padded for the compiler's sake. Layers of a tower share their graphs. There is one
for each tower and each way to run it (with and without gradient, in training and evaluation), and a few more for
shapes that torch treats apart, such as a single row.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPModel

MAX_GRAPHS = 32
"""Graphs of a layer. torch's own limit of 8 counts those of both towers together; what is above it is an error."""


def compile_layers(model: CLIPModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the whole layers of both towers, in place, at their first use. The same numbers up to rounding.

    Names of parameters stay as they are. The last layer of a tower runs at one row (`longclip.encode`) and is left.
    Call it before layers are sharded.

    Args:
        model: the CLIP.
        backend: of `torch.compile`; `inductor` needs a C++ compiler, or Triton on a GPU.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers[:-1]:
            layer.compile(backend=backend, fullgraph=True, dynamic=True)
