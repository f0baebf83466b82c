"""Long-CLIP: image-text models that read 248 tokens (arXiv 2403.15378). The library; it does not need Ray.

`__init__.pyi` lists the exported names. Each is imported at its first use: importing the model classes of transformers
takes seconds, which every small process of a Ray job would pay.
"""

import ast
from importlib import import_module, resources
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(resources.files("longclip").joinpath("__init__.pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longclip' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
