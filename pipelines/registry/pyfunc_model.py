"""The registered model as an MLflow pyfunc, for notebooks: texts in, unit-length embeddings out.

MLflow runs this file when it loads the model ("models from code"): nothing is unpickled.
"""

from typing import Any

import mlflow
import torch

from longclip.checkpoint import load_checkpoint
from longclip.encode import encode_text, unit
from longclip.tokenizer import tokenize


class TextEmbedder(mlflow.pyfunc.PythonModel):
    """Embeds texts; those longer than the model's context length are truncated."""

    def load_context(self, context: Any) -> None:
        """Load the registered checkpoint."""
        self.checkpoint = load_checkpoint(context.artifacts["checkpoint"])

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[list[float]]:
        """Embeddings of N texts, as N lists of D numbers. MLflow derives the model's signature from these types."""
        tokens = tokenize(self.checkpoint.tokenizer, model_input)
        with torch.inference_mode():
            return unit(encode_text(self.checkpoint.model, tokens)).tolist()


mlflow.models.set_model(TextEmbedder())
