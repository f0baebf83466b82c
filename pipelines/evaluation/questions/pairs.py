"""Groups of two images and two texts: does each find its counterpart?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.questions.choices import ALL
from pipelines.evaluation.questions.rows import Embedded, Row
from pipelines.evaluation.scores import ROUNDING, Score

TEXT, IMAGE, GROUP = "text", "image", "group"
CHANCE = {TEXT: 1 / 4, IMAGE: 1 / 4, GROUP: 1 / 6}
"""Share of right answers by guessing, as Winoground's paper has it."""


@dataclass(frozen=True)
class Pair:
    """One question: two rows with one text each."""

    id: str
    rows: tuple[str, str]
    subset: str = ""

    def answers(self, embedded: Mapping[str, Embedded]) -> dict[str, bool]:
        """Whether each image finds its text, each text its image, and both; equal scores are not right."""
        first, second = (embedded[row] for row in self.rows)
        # scores[i, t] of image i and text t
        scores = np.stack([first.image, second.image]) @ np.stack([first.texts[0], second.texts[0]]).T
        text = scores[0, 0] - scores[0, 1] > ROUNDING and scores[1, 1] - scores[1, 0] > ROUNDING
        image = scores[0, 0] - scores[1, 0] > ROUNDING and scores[1, 1] - scores[0, 1] > ROUNDING
        return {TEXT: bool(text), IMAGE: bool(image), GROUP: bool(text and image)}


class Pairs:
    """A set of pairs, scored as Winoground is: text, image and group score."""

    def __init__(self, rows: Sequence[Row], pairs: Sequence[Pair]) -> None:
        self.rows, self.pairs = rows, pairs

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """See `QuestionSet`."""
        asked, answers = self.answered(embedded)
        if not asked:
            return {}
        names = (TEXT, IMAGE, GROUP)
        return {name: pair_score(asked, [a[name] for a in answers], True, CHANCE[name]) for name in names}

    def answered(self, embedded: Mapping[str, Embedded]) -> tuple[list[Pair], list[dict[str, bool]]]:
        """The pairs whose rows are there, and their answers."""
        asked = [pair for pair in self.pairs if all(row in embedded for row in pair.rows)]
        return asked, [pair.answers(embedded) for pair in asked]


class BlindPairs(Pairs):
    """A set of pairs, scored as MMVP-VLM is: each text must find its image, of all pairs and by subset."""

    def scores(self, embedded: Mapping[str, Embedded]) -> dict[str, Score]:
        """See `QuestionSet`."""
        asked, answers = self.answered(embedded)
        if not asked:
            return {}
        right = [answer[IMAGE] for answer in answers]
        scores = {ALL: pair_score(asked, right, True, CHANCE[IMAGE])}
        for name in dict.fromkeys(pair.subset for pair in asked):
            chosen = [number for number, pair in enumerate(asked) if pair.subset == name]
            part = [asked[number] for number in chosen]
            scores[name] = pair_score(part, [right[number] for number in chosen], False, CHANCE[IMAGE])
        return scores


def pair_score(pairs: Sequence[Pair], right: Sequence[bool], is_main: bool, chance: float) -> Score:
    """Share of right answers; no image is in two pairs."""
    ids = tuple(pair.id for pair in pairs)
    return Score(np.array(right, np.float64), ids, np.arange(len(pairs)), is_main, chance)
