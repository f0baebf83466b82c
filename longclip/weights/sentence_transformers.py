"""Directories that sentence-transformers loads as a model of texts and images."""

import json
from pathlib import Path

from longclip.checkpoint import Checkpoint, save_checkpoint

MODULES = "modules.json"
_MODULE = "0_CLIPModel"
# The class by the name that every release since 2.0 knows; 6.2 maps it to the module that took its place.
_MODULE_TYPE = "sentence_transformers.models.CLIPModel"


def write_sentence_transformers(checkpoint: Checkpoint, directory: Path) -> str:
    """Write a model of one module, whose directory is a complete Hugging Face CLIP.

    Returns:
        How to load it.
    """
    save_checkpoint(checkpoint, directory / _MODULE, {"origin": "export"})
    modules = [{"idx": 0, "name": "0", "path": _MODULE, "type": _MODULE_TYPE}]
    (directory / MODULES).write_text(json.dumps(modules, indent=2) + "\n")
    return 'SentenceTransformer("{path}")'
