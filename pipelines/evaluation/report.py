"""Results of tasks for people: one Markdown and one HTML page, with a plot of recall against the length of text."""

from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.common.pages import TEMPLATES
from pipelines.common.plots import Line, line_plot
from pipelines.common.tables import Table

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text", "image_to_class": "image to class"}
CHANGE_TITLES = {
    "sentences_shuffled": "sentences shuffled",
    "first_sentence_dropped": "first sentence dropped",
    "half_of_words_dropped": "half of the words dropped",
}
NEGATIVE_TITLES = {"replaced": "another one in its place", "exchanged": "two exchanged"}


def render_markdown(title: str, results: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    parts = [f"# {title}"]
    for result in results:
        parts += [f"## {result['task']}: {result['protocol']}", " ".join(_facts(result))]
        parts += [table.markdown() for table in tables(result)]
    return "\n\n".join(parts) + "\n"


def render_html(title: str, results: Sequence[dict[str, Any]]) -> str:
    """The report as one HTML file; all texts are escaped."""
    sections = [
        {
            "heading": f"{result['task']}: {result['protocol']}",
            "facts": _facts(result),
            "tables": list(tables(result)),
            "plot": recall_plot(result),
        }
        for result in results
    ]
    return TEMPLATES.get_template("evaluation/report.html").render(title=title, sections=sections)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """All tables of a task."""
    directions = [
        (model, direction, figures)
        for model, found in result["models"].items()
        for direction, figures in found["directions"].items()
    ]
    recalls = [name for name in directions[0][2] if name.startswith("recall@")]
    retrieval = result["kind"] == "retrieval"
    yield Table(
        f"{'Recall' if retrieval else 'Accuracy'} in percent, with 95 % intervals",
        [
            *("model", "direction", *[name.replace("recall@", "R@" if retrieval else "top ") for name in recalls]),
            *(["mAP", "median rank"] if retrieval else []),
            "tied queries",
        ],
        [
            [
                *(model, DIRECTIONS[direction], *[_percent(figures[name]) for name in recalls]),
                *([_percent(figures["map"]), f"{figures['median_rank']:g}"] if retrieval else []),
                str(figures["tied_queries"]),
            ]
            for model, direction, figures in directions
        ],
        words=2,
    )
    if result["comparisons"]:
        yield Table(
            f"Against {result['comparisons'][0]['base']}, the same queries, at 1",
            ["model", "direction", "change, points", "better", "worse", "p (paired)"],
            [
                [line["model"], DIRECTIONS[line["direction"]], change_text(line), *_counts(line)]
                for line in result["comparisons"]
            ],
            words=2,
        )
    if result["published"]:
        yield Table(
            "Beside published figures, at 1",
            ["model", "direction", "published as", "source", "published", "measured", "difference", "verdict"],
            [
                [
                    *(line["model"], DIRECTIONS[line["direction"]], line["published_model"], line["source"]),
                    *(f"{line['published']:.1f}", f"{line['measured']:.1f}", f"{line['difference']:+.1f}"),
                    "reproduced" if line["reproduced"] else "not reproduced",
                ]
                for line in result["published"]
            ],
            words=4,
        )
    yield from _long_text_tables(result)
    yield from _hard_negative_tables(result)


def _long_text_tables(result: dict[str, Any]) -> Iterator[Table]:
    lengths = _lengths(result)
    if not lengths:
        return
    studied = [
        (model, direction, long_text)
        for model, found in result["models"].items()
        for direction, long_text in found.get("long_text", {}).items()
    ]
    yield Table(
        "Recall at 1 when only so many tokens are read; the effective length is where reading more no longer helps"
        " (paired test, p < 0.05)",
        ["model", "direction", *map(str, lengths), "effective length"],
        [
            [
                *(model, DIRECTIONS[direction]),
                *[_at(long_text["recall@1"], tokens) for tokens in lengths],
                str(long_text["effective_length"]),
            ]
            for model, direction, long_text in studied
        ],
        words=2,
    )
    yield Table(
        "Recall at 1 when the texts are changed",
        ["model", "direction", "change of the text", "R@1", "change, points", "better", "worse", "p (paired)"],
        [
            [
                *(model, DIRECTIONS[direction], CHANGE_TITLES[name]),
                *(f"{100 * line['recall@1']:.1f}", change_text(line), *_counts(line)),
            ]
            for model, direction, long_text in studied
            for name, line in long_text["changes"].items()
        ],
        words=3,
    )


def _hard_negative_tables(result: dict[str, Any]) -> Iterator[Table]:
    rows = [
        [
            *(model, NEGATIVE_TITLES[kind], _percent(line)),
            *(str(line[name]) for name in ("right", "equal", "pairs", "texts")),
        ]
        for model, found in result["models"].items()
        for kind, line in found.get("hard_negatives", {}).items()
    ]
    if rows:
        yield Table(
            "Images that lie nearer to their caption than to one with an attribute changed behind token 77, in percent"
            " (chance: 50; equal scores are not right)",
            ["model", "attribute", "right, percent", "right", "equal", "pairs", "texts"],
            rows,
            words=2,
        )


def recall_plot(result: dict[str, Any]) -> str:
    """Recall at 1 against the number of tokens read, as SVG; empty if the length was not studied."""
    lines = [
        Line(
            f"{model}, {DIRECTIONS[direction]}",
            [(point["tokens"], 100 * point["value"]) for point in long_text["recall@1"]],
            number,
            dashed=direction == "image_to_text",
        )
        for number, (model, figures) in enumerate(result["models"].items())
        for direction, long_text in figures.get("long_text", {}).items()
    ]
    return line_plot({"recall at 1, percent": lines}, "tokens read", _lengths(result), (0, 100), panel_height=220)


def _lengths(result: dict[str, Any]) -> list[int]:
    """Every length at which some model was read, in order."""
    studies = [found["long_text"] for found in result["models"].values() if "long_text" in found]
    return sorted({point["tokens"] for study in studies for line in study.values() for point in line["recall@1"]})


def _facts(result: dict[str, Any]) -> list[str]:
    """Sentences on what was measured, candidate counts above all."""
    found = next(iter(result["models"].values()))
    candidates = {DIRECTIONS[direction]: figures["candidates"] for direction, figures in found["directions"].items()}
    facts = [f"{result['title']}." if result["title"] != result["task"] else ""]
    counts = f"{found['images']} images" + (f", {found['texts']} texts" if found["texts"] else "")
    facts.append(f"{counts}. Candidates: " + ", ".join(f"{count} {name}" for name, count in candidates.items()) + ".")
    for model, measured in result["models"].items():
        cut = f", which cut {measured['texts_cut']} texts" if measured["texts_cut"] else ""
        facts.append(f"{model} reads {measured['context_length']} tokens{cut}.")
    return [fact for fact in [*facts, result["note"]] if fact]


def _percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def change_text(line: dict[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}]"


def _counts(line: dict[str, float]) -> list[str]:
    return [str(line["better"]), str(line["worse"]), f"{line['p_value']:.4f}"]


def _at(points: Sequence[dict[str, float]], tokens: int) -> str:
    return next((f"{100 * point['value']:.1f}" for point in points if point["tokens"] == tokens), "")
