"""Retrieval on held-out rows during training, with the rows divided among the workers."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import CLIPModel

from longclip.encode import encode_image, encode_text, unit
from longclip.evaluation.metrics import retrieval_figures, retrieval_ranks
from longclip.images import ImageTransform
from longclip.training.distributed import gather_with_gradient
from pipelines.common.model_inputs import chosen_texts


@torch.no_grad()
def validate(
    model: CLIPModel, transform: ImageTransform, batches: Iterator[dict[str, Tensor]], texts: Sequence[str]
) -> dict[str, float]:
    """Measure retrieval in both directions with each text column, among the rows of all workers.

    Args:
        model: model to measure.
        transform: normalises its images.
        batches: this worker's rows as `ModelInputs` makes them; every worker has the same number.
        texts: text columns; of a cell with several texts, the first is used.

    Returns:
        `validation/<column>/image_to_text/recall@1` and the other figures of `Ranks`, and the mean of recall@1 over
        both directions as `validation/<column>/mean_recall@1`; the same on every worker.
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[Tensor]] = {"row_key": [], "image": [], **{name: [] for name in texts}}
    for batch in batches:
        parts["row_key"].append(batch["row_key"].to(model.device))
        parts["image"].append(unit(encode_image(model, transform.normalize(batch["pixels"].to(model.device)))))
        for name in texts:
            first = torch.zeros_like(batch["row_key"])
            parts[name].append(unit(encode_text(model, chosen_texts(batch, name, first))))
    model.train(was_training)
    gathered = {name: gather_with_gradient(torch.cat(part)).cpu() for name, part in parts.items()}
    unique = _first_occurrences(gathered.pop("row_key"))
    image = gathered.pop("image")[unique]
    metrics: dict[str, float] = {}
    for name, text in gathered.items():
        figures = retrieval_figures(retrieval_ranks(image, text[unique], torch.arange(len(unique))))
        metrics |= {f"validation/{name}/{key}": value for key, value in figures.items()}
        both = [figures[f"{direction}/recall@1"] for direction in ("image_to_text", "text_to_image")]
        metrics[f"validation/{name}/mean_recall@1"] = sum(both) / 2
    return metrics


def _first_occurrences(keys: Tensor) -> Tensor:
    """Positions of the first of equal keys: a row that replaced an unusable one occurs twice."""
    order = torch.argsort(keys, stable=True)
    is_first = torch.ones(len(keys), dtype=torch.bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    return order[is_first].sort().values
