"""Layouts of question sets: each function reads the annotations of one into rows and questions."""

from collections.abc import Callable, Iterator

from longclip.errors import DataError
from pipelines.evaluation.questions.annotations import AnnotationEntry, Annotations
from pipelines.evaluation.questions.choices import Choice, Choices, RowsByImage
from pipelines.evaluation.questions.eccv_caption import eccv_caption
from pipelines.evaluation.questions.monotonicity import GrowingCaptions
from pipelines.evaluation.questions.pairs import BlindPairs, Pair, Pairs
from pipelines.evaluation.questions.rows import QuestionSet, Row

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
SUGARCREPE_PP = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
PHOTO = "a photo of "
"""What MMVP's script puts in front of each statement."""


def sugarcrepe(annotations: Annotations) -> Choices:
    """`<subset>.json` of `{filename, caption, negative_caption}` by number, for seven subsets."""
    return _sugarcrepe(annotations, SUGARCREPE, ("caption",))


def sugarcrepe_pp(annotations: Annotations) -> Choices:
    """The same with a second right caption, `caption2`, for five subsets."""
    return _sugarcrepe(annotations, SUGARCREPE_PP, ("caption", "caption2"))


def _sugarcrepe(annotations: Annotations, subsets: tuple[str, ...], right: tuple[str, ...]) -> Choices:
    rows, choices = RowsByImage(), []
    for subset in subsets:
        for entry in annotations.json_entries(f"{subset}.json"):
            image, wrong = entry.text("filename"), entry.text("negative_caption")
            texts = [entry.text(name) for name in right]
            *places, last = rows.places(image, [*texts, wrong])
            choices.append(Choice(f"{subset}/{entry.key}", image, tuple(places), (last,), subset))
    return Choices(rows.rows(), choices, text_only=len(right) > 1)


def fg_ovd(annotations: Annotations) -> Choices:
    """FG-CLIP's `1_attributes_llava.jsonl`: `{img_path, bbox, pos_expression, neg_expression}`, a box per line."""
    rows, choices = [], []
    for entry in annotations.json_line_entries("1_attributes_llava.jsonl", "h_attributes_llava.jsonl"):
        right, wrong = entry.texts("pos_expression"), entry.texts("neg_expression")
        if len(right) != 1:
            raise entry.error(f"has {len(right)} right captions; one is expected")
        row = Row(f"{int(entry.key):06d}", entry.text("img_path"), [*right, *wrong], entry.box("bbox"))
        rows.append(row)
        choices.append(Choice(row.id, row.id, (0,), tuple(range(1, len(row.texts))), "hard"))
    return Choices(rows, choices)


def winoground(annotations: Annotations) -> Pairs:
    """`examples.jsonl` of `{id, image_0, image_1, caption_0, caption_1}`; images are `<name>.png`."""
    rows, pairs = [], []
    for entry in annotations.json_line_entries("examples.jsonl"):
        key = f"{entry.number('id'):03d}"
        pair = [
            Row(f"{key}/{side}", f"{entry.text(f'image_{side}')}.png", [entry.text(f"caption_{side}")])
            for side in (0, 1)
        ]
        rows += pair
        pairs.append(Pair(key, (pair[0].id, pair[1].id)))
    return Pairs(rows, pairs)


def mmvp_vlm(annotations: Annotations) -> BlindPairs:
    """`Questions.csv` of `Question ID,Type,Statement`, where an odd and the next even number are a pair; the images are
    `<type of the odd one>/<number>.jpg`."""
    rows, pairs = [], []
    for first, second in _two_by_two(annotations.csv_entries("Questions.csv")):
        numbers, subset = [entry.number("Question ID") for entry in (first, second)], first.text("Type").strip()
        if numbers[0] % 2 == 0 or numbers[1] != numbers[0] + 1:
            raise first.error(f"has number {numbers[0]} and the next {numbers[1]}; an odd one and the next are a pair")
        pair = [
            Row(f"{number:03d}", f"{subset}/{number}.jpg", [PHOTO + entry.text("Statement")])
            for number, entry in zip(numbers, (first, second), strict=True)
        ]
        rows += pair
        pairs.append(Pair(pair[0].id, (pair[0].id, pair[1].id), subset))
    return BlindPairs(rows, pairs)


def _two_by_two(entries: Iterator[AnnotationEntry]) -> Iterator[tuple[AnnotationEntry, AnnotationEntry]]:
    for first in entries:
        second = next(entries, None)
        if second is None:
            raise first.error("is not followed by the other one of its pair")
        yield first, second


def himo_docci(annotations: Annotations) -> GrowingCaptions:
    """HiMo-CLIP's `himo_docci_data.json`: in each line `{img_path, caption}` with captions that get longer."""
    rows = []
    for entry in annotations.json_line_entries("himo_docci_data.json"):
        rows.append(Row(f"{int(entry.key):04d}", entry.text("img_path"), entry.texts("caption")))
    return GrowingCaptions(rows)


LAYOUTS: dict[str, Callable[[Annotations], QuestionSet]] = {
    "sugarcrepe": sugarcrepe,
    "sugarcrepe-pp": sugarcrepe_pp,
    "fg-ovd": fg_ovd,
    "winoground": winoground,
    "mmvp-vlm": mmvp_vlm,
    "himo-docci": himo_docci,
    "eccv-caption": eccv_caption,
}
"""Layouts by their name in protocols.yaml."""


def read_questions(layout: str, annotations: Annotations) -> QuestionSet:
    """The questions of a directory.

    Raises:
        DataError: a file is missing or wrong, or two rows have the same id.
    """
    questions = LAYOUTS[layout](annotations)
    seen: set[str] = set()
    for row in questions.rows:
        if row.id in seen:
            raise DataError(f"{annotations.field}='{annotations.root}' has row '{row.id}' twice; restore its files")
        seen.add(row.id)
    if not seen:
        raise DataError(f"{annotations.field}='{annotations.root}' has annotations without any entry")
    return questions
