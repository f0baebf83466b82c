"""Choices between captions: is an image closer to all of its right captions than to any of the wrong ones?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from pipelines.evaluation.questions.rows import Embedded, Row, image_groups
from pipelines.evaluation.scores import ROUNDING, Score

ALL = "all"
TEXT_ONLY = "text_only"


@dataclass(frozen=True)
class Choice:
    """One question: its row, and which of the row's texts are right and wrong."""

    id: str
    row: str
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    subset: str
    """Part of the set, which gets a figure of its own."""

    def is_right(self, row: Embedded) -> bool:
        """Whether each right text is closer than each wrong one; equal scores are not right."""
        scores = row.similarities()
        return bool(scores[list(self.right)].min() - scores[list(self.wrong)].max() > ROUNDING)

    def is_right_without_image(self, row: Embedded) -> bool:
        """Whether the two right texts are closer to each other than each is to the wrong one."""
        (first, second), (wrong,) = self.right, self.wrong
        likeness = row.texts @ row.texts.T
        return bool(likeness[first, second] - max(likeness[first, wrong], likeness[second, wrong]) > ROUNDING)


class Choices:
    """A set of choices."""

    def __init__(self, rows: Sequence[Row], choices: Sequence[Choice], text_only: bool = False) -> None:
        """
        Args:
            rows: images with all of their texts.
            choices: the questions.
            text_only: also compare the texts with each other; every question has two right texts and one wrong one.
        """
        self.rows, self.choices, self.text_only = rows, choices, text_only
        self.groups = image_groups(rows)

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """See `QuestionSet`: the share of right choices, of all and by subset."""
        asked = [choice for choice in self.choices if choice.row in embedded]
        if not asked:
            return {}
        right = np.array([choice.is_right(embedded[choice.row]) for choice in asked], np.float64)
        subsets = {name: [choice.subset == name for choice in asked] for name in dict.fromkeys(c.subset for c in asked)}
        scores = {ALL: self._score(asked, right, np.ones(len(asked), bool), is_main=True)}
        if len(subsets) > 1:
            scores |= {name: self._score(asked, right, np.array(of)) for name, of in subsets.items()}
        if self.text_only:
            alike = np.array([choice.is_right_without_image(embedded[choice.row]) for choice in asked], np.float64)
            scores[TEXT_ONLY] = self._score(asked, alike, np.ones(len(asked), bool))
        return scores

    def _score(self, asked: Sequence[Choice], right: np.ndarray, chosen: np.ndarray, is_main: bool = False) -> Score:
        choices = [choice for choice, is_chosen in zip(asked, chosen, strict=True) if is_chosen]
        # All orders of the scores are equally likely; in one of them the right texts are in front.
        chance = np.mean([1 / comb(len(choice.right) + len(choice.wrong), len(choice.right)) for choice in choices])
        groups = np.array([self.groups[choice.row] for choice in choices])
        return Score(right[chosen], tuple(choice.id for choice in choices), groups, is_main, float(chance))


class RowsByImage:
    """Rows under construction: one for each image, with its different texts."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, int]] = {}

    def places(self, image: str, texts: Sequence[str]) -> tuple[int, ...]:
        """Places of the texts in the row of the image, which they are added to; its id is the image's name."""
        known = self._places.setdefault(image, {})
        return tuple(known.setdefault(text, len(known)) for text in texts)

    def rows(self) -> list[Row]:
        """The rows, in the order in which the images came."""
        return [Row(image, image, list(places)) for image, places in self._places.items()]
