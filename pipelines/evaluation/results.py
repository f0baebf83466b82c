"""The result of a task as JSON: figures of every model with intervals, comparisons, and published figures beside."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from longclip.evaluation.significance import compare_paired
from longclip.text.perturbations import CHANGES
from pipelines.evaluation.measured import Answers, Measured, compare
from pipelines.evaluation.measuring import CUTS
from pipelines.evaluation.tasks import Task

PUBLISHED = Path(__file__).with_name("paper_figures.yaml")
TOLERANCE = 0.5
"""Points within which a published figure counts as reproduced: what precision and re-encoded images may move."""

SIGNIFICANT = 0.05


@cache
def published() -> dict[str, list[dict[str, Any]]]:
    """Published figures by the name of a model."""
    return yaml.safe_load(PUBLISHED.read_text())


def task_result(
    task: Task,
    measured: Mapping[str, Measured],
    sources: Mapping[str, str],
    base: str,
    known_as: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that was found out on a task, ready to be written as JSON.

    Args:
        task: the task.
        measured: model name -> what was measured.
        sources: model name -> where it came from.
        base: model that the others are compared with.
        known_as: model name -> its name in published.yaml.
    """
    first = next(iter(measured.values()))
    return {
        "task": task.name,
        "protocol": first.protocol,
        "title": task.protocol.title,
        "kind": "zero_shot" if task.is_zero_shot else "retrieval",
        "text": task.protocol.text,
        "note": task.protocol.note,
        "data": task.source.describe(),
        "models": {name: _model_result(found, sources[name]) for name, found in measured.items()},
        "comparisons": [
            {"base": base, "model": name, "direction": direction, "figure": "recall@1"}
            | compare(measured[base], found, direction).asdict()
            for name, found in measured.items()
            if name != base
            for direction in found.whole
        ],
        "published": [
            line
            for name, other in known_as.items()
            if name in measured
            for line in _beside_published(task, measured[name], name, other)
        ],
    }


def _model_result(found: Measured, source: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "source": source,
        "context_length": found.context_length,
        "precision": "float32",
        "images": found.images,
        "texts": found.texts,
        "texts_cut": found.texts_cut,
        "directions": {direction: answers.figures() for direction, answers in found.whole.items()},
    }
    if len(found.answers) > 1:
        result["long_text"] = {direction: _long_text(found, direction) for direction in found.whole}
        result["hard_negatives"] = {kind: choices.figures() for kind, choices in found.choices.items()}
    return result


def _long_text(found: Measured, direction: str) -> dict[str, Any]:
    """Recall at 1 against the length that is read, and what changes of the text cost."""
    whole = found.whole[direction]
    cuts = [cut for cut in CUTS if f"cut_{cut}" in found.answers]
    by_length = [(cut, found.answers[f"cut_{cut}"][direction]) for cut in cuts] + [(found.context_length, whole)]
    effective = found.context_length
    for length, answers in reversed(by_length[:-1]):
        if _loses(answers, whole):
            break
        effective = length
    changes = {name: _change(found.answers[name][direction], whole) for name in CHANGES}
    recall = [{"tokens": length} | answers.figures()["recall@1"] for length, answers in by_length]
    return {"recall@1": recall, "effective_length": effective, "changes": changes}


def _loses(answers: Answers, whole: Answers) -> bool:
    against = compare_paired(whole.hits(), answers.hits(), whole.groups)
    return against.difference < 0 and against.p_value < SIGNIFICANT


def _change(answers: Answers, whole: Answers) -> dict[str, float]:
    return {"recall@1": answers.ranks.recall(1)} | compare_paired(whole.hits(), answers.hits(), whole.groups).asdict()


def _beside_published(task: Task, found: Measured, name: str, known_as: str) -> list[dict[str, Any]]:
    if found.protocol != task.pinned:  # a user's own data, or a part of the protocol's
        return []
    lines = []
    for entry in published()[known_as]:
        for direction, answers in found.whole.items():
            if entry["task"] == task.pinned and direction in entry:
                measured = 100 * answers.ranks.recall(1)
                difference = measured - entry[direction]
                lines.append(
                    {
                        "model": name,
                        "published_model": known_as,
                        "direction": direction,
                        "figure": "recall@1",
                        "published": entry[direction],
                        "measured": measured,
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
        for model, found in result["models"].items():
            for direction, figures in found["directions"].items():
                for name, value in figures.items():
                    key = f"{result['task']}/{direction}/{name}"
                    flat.setdefault(model, {})[key] = value["value"] if isinstance(value, dict) else value
    return flat
