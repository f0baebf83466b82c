"""Long-CLIP: image-text models that read 248 tokens (arXiv 2403.15378). The library; needs no Ray."""

from longclip.captions import split_sentences, summarizer
from longclip.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from longclip.encode import encode_image, encode_text
from longclip.images import ImageTransform
from longclip.loss import LossConfig, contrastive_loss, long_clip_losses
from longclip.metrics import retrieval_recall
from longclip.pcm import primary_components
from longclip.stretch import interpolate_positions, stretch_positions
from longclip.tokenizer import TokenBatch, build_tokenizer, tokenize

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
    "retrieval_recall",
    "save_checkpoint",
    "split_sentences",
    "stretch_positions",
    "summarizer",
    "tokenize",
]
