# What `longclip` exports. Type checkers read this file, and `__init__.py` imports each name from here at its first use.

from longclip.checkpoint import Checkpoint as Checkpoint
from longclip.checkpoint import load_checkpoint as load_checkpoint
from longclip.checkpoint import save_checkpoint as save_checkpoint
from longclip.encode import encode_image as encode_image
from longclip.encode import encode_text as encode_text
from longclip.evaluation.metrics import retrieval_figures as retrieval_figures
from longclip.evaluation.metrics import retrieval_ranks as retrieval_ranks
from longclip.export import export_checkpoint as export_checkpoint
from longclip.images import ImageTransform as ImageTransform
from longclip.stretch import freeze_kept_positions as freeze_kept_positions
from longclip.stretch import interpolate_positions as interpolate_positions
from longclip.stretch import stretch_checkpoint as stretch_checkpoint
from longclip.stretch import stretch_positions as stretch_positions
from longclip.text.sentences import split_sentences as split_sentences
from longclip.text.summaries import summarizer as summarizer
from longclip.tokenizer import TokenBatch as TokenBatch
from longclip.tokenizer import build_tokenizer as build_tokenizer
from longclip.tokenizer import tokenize as tokenize
from longclip.training.loss import LossConfig as LossConfig
from longclip.training.loss import contrastive_loss as contrastive_loss
from longclip.training.loss import long_clip_losses as long_clip_losses
from longclip.training.pcm import primary_components as primary_components
from longclip.weights.reading import convert_checkpoint as convert_checkpoint

__version__: str
