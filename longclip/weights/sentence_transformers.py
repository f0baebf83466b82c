"""Directories that sentence-transformers loads as a model of texts and images."""

import json
from pathlib import Path

from longclip.checkpoint import Checkpoint, save_checkpoint
from longclip.errors import CheckpointError

MODULES = "modules.json"
_MODULE = "0_CLIPModel"
# The class name that every release since 2.0 knows; 6.2 maps it to the module that replaced it.
_MODULE_TYPE = "sentence_transformers.models.CLIPModel"
_NORMALIZE, _NORMALIZE_TYPE = "1_Normalize", "sentence_transformers.models.Normalize"


def clip_module(directory: Path) -> Path:
    """Directory of the CLIP in a sentence-transformers directory; may be that directory itself.

    Raises:
        CheckpointError: `modules.json` is damaged, or the model is not a CLIP alone.
    """
    path = directory / MODULES
    try:
        modules = [
            (module["type"].rpartition(".")[2], Path(module["path"])) for module in json.loads(path.read_text("utf-8"))
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot make sense of '{path}': {error!r}") from error
    others = [kind for kind, _ in modules[1:] if kind != "Normalize"]
    if not modules or others:
        what = f"{others[0]} after its first module" if others else "no module"
        raise CheckpointError(f"sentence-transformers model '{directory}' has {what}: it is not a CLIP alone")
    module = modules[0][1]
    if module.is_absolute() or ".." in module.parts:
        raise CheckpointError(f"sentence-transformers model '{directory}' has its first module elsewhere: '{module}'")
    return directory / module


def write(checkpoint: Checkpoint, directory: Path) -> str:
    """Write a model of unit vectors; the directory of its first module is a complete Hugging Face CLIP.

    Returns:
        How to load it.
    """
    save_checkpoint(checkpoint, directory / _MODULE, {"origin": "export"})
    (directory / _NORMALIZE).mkdir()  # has no settings
    kinds = ((_MODULE, _MODULE_TYPE), (_NORMALIZE, _NORMALIZE_TYPE))
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": kind} for place, (path, kind) in enumerate(kinds)
    ]
    (directory / MODULES).write_text(json.dumps(modules, indent=2) + "\n")
    return 'SentenceTransformer("{path}")'
