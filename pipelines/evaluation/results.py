"""The result of a task as JSON: each model's figures with intervals, paired comparisons, and the papers' figures."""

from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.effective_length import MARGIN, recall_by_length
from pipelines.evaluation.measured import Measured, compare
from pipelines.evaluation.measuring import CUTS
from pipelines.evaluation.paper_figures import paper_figures
from pipelines.evaluation.perturbed import perturbation_results
from pipelines.evaluation.tasks import Task

TOLERANCE = 0.5
"""Points within which a paper's figure counts as reproduced: the effect of precision and of re-encoded images."""


def task_result(
    task: Task,
    measured: Mapping[str, Measured],
    sources: Mapping[str, str],
    base: str,
    paper_models: Mapping[str, str],
    margin: float = MARGIN,
) -> dict[str, Any]:
    """The result of a task, ready to be written as JSON.

    Args:
        task: the task.
        measured: model name -> its measurement.
        sources: model name -> where it came from.
        base: the model that the others are compared with, once it is measured.
        paper_models: model name -> its name in paper_figures.yaml.
        margin: loss that counts as equal in the effective length.
    """
    first = next(iter(measured.values()))
    return {
        "task": task.name,
        "protocol": first.protocol,
        "title": task.protocol.title,
        "kind": task.kind,
        "text": task.protocol.text,
        "note": task.protocol.note,
        "data": task.source.describe(),
        "models": {name: _model_result(model, sources[name], margin) for name, model in measured.items()},
        "comparisons": [
            {"base": base, "model": name, "direction": compared}
            | ({"figure": "recall@1"} if compared in model.whole else {"figure": "score"})
            | compare(measured[base], model, compared).asdict()
            for name, model in measured.items()
            if name != base and base in measured
            for compared in model.compared
        ],
        "paper_figures": [
            line
            for name, other in paper_models.items()
            if name in measured
            for line in _against_paper(task, measured[name], name, other)
        ],
    }


def _model_result(measured: Measured, source: str, margin: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "source": source,
        "context_length": measured.context_length,
        "precision": "float32",
        "images": measured.images,
        "texts": measured.texts,
        "texts_cut": measured.texts_cut,
        "directions": {direction: answers.figures() for direction, answers in measured.whole.items()},
        "scores": {name: score.figures() for name, score in measured.scores.items()},
    }
    if len(measured.answers) > 1:
        result["long_text"] = {direction: _long_text(measured, direction, margin) for direction in measured.whole}
        result["hard_negatives"] = {kind: choices.figures() for kind, choices in measured.choices.items()}
    return result


def _long_text(measured: Measured, direction: str, margin: float) -> dict[str, Any]:
    """Recall at 1 by maximum tokens, and by perturbation of the text."""
    whole = measured.whole[direction]
    cuts = {cut: measured.answers[f"cut_{cut}"][direction] for cut in CUTS if f"cut_{cut}" in measured.answers}
    by_length = recall_by_length(cuts | {measured.context_length: whole}, margin)
    return by_length | {"changes": perturbation_results(measured, direction)}


def _against_paper(task: Task, measured: Measured, name: str, paper_model: str) -> list[dict[str, Any]]:
    if measured.protocol != task.pinned:  # the user's data, or a subset of the protocol's
        return []
    figures = {direction: ("recall@1", answers.ranks.recall(1)) for direction, answers in measured.whole.items()}
    figures |= {score: ("score", float(values.values.mean())) for score, values in measured.scores.items()}
    lines = []
    for entry in paper_figures()[paper_model]:
        for direction, (figure, share) in figures.items():
            if entry["task"] == task.pinned and direction in entry:
                value = 100 * share
                difference = value - entry[direction]
                lines.append(
                    {
                        "model": name,
                        "paper_model": paper_model,
                        "direction": direction,
                        "figure": figure,
                        "paper": entry[direction],
                        "measured": value,
                        "difference": difference,
                        "reproduced": abs(difference) <= TOLERANCE,
                        "source": entry["source"],
                    }
                )
    return lines


def flat_figures(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`{model: {"task/direction/recall@1": value, ...}}` of all results, as registries and tables take them."""
    flat: dict[str, dict[str, float]] = {}
    for result in results:
        for model, values in result["models"].items():
            for direction, figures in values["directions"].items():
                for name, value in figures.items():
                    key = f"{result['task']}/{direction}/{name}"
                    flat.setdefault(model, {})[key] = value["value"] if isinstance(value, dict) else value
            for name, score in values["scores"].items():
                flat.setdefault(model, {})[f"{result['task']}/{name}"] = score["value"]
    return flat
