"""Long-CLIP: image-text models that read 248 tokens (arXiv 2403.15378). The library; needs no Ray.

Names are imported when they are first used. A Ray job starts many small processes, and importing the model classes of
transformers costs each of them seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longclip.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from longclip.encode import encode_image, encode_text
    from longclip.evaluation.metrics import retrieval_figures, retrieval_ranks
    from longclip.images import ImageTransform
    from longclip.stretch import interpolate_positions, stretch_positions
    from longclip.text.sentences import split_sentences, summarizer
    from longclip.tokenizer import TokenBatch, build_tokenizer, tokenize
    from longclip.training.loss import LossConfig, contrastive_loss, long_clip_losses
    from longclip.training.pcm import primary_components

_HOMES = {
    "captions": ("split_sentences", "summarizer"),
    "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "encode": ("encode_image", "encode_text"),
    "images": ("ImageTransform",),
    "loss": ("LossConfig", "contrastive_loss", "long_clip_losses"),
    "metrics": ("retrieval_figures", "retrieval_ranks"),
    "pcm": ("primary_components",),
    "stretch": ("interpolate_positions", "stretch_positions"),
    "tokenizer": ("TokenBatch", "build_tokenizer", "tokenize"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "ImageTransform",
    "LossConfig",
    "TokenBatch",
    "build_tokenizer",
    "contrastive_loss",
    "encode_image",
    "encode_text",
    "interpolate_positions",
    "load_checkpoint",
    "long_clip_losses",
    "primary_components",
    "retrieval_figures",
    "retrieval_ranks",
    "save_checkpoint",
    "split_sentences",
    "stretch_positions",
    "summarizer",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'longclip' has no attribute '{name}'")
    return getattr(import_module(f"longclip.{_HOME_OF[name]}"), name)
