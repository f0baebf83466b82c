"""Reports of results as Markdown and HTML, with a plot of recall against the number of tokens read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pipelines.common.pages import TEMPLATES
from pipelines.common.plots import Line, line_plot
from pipelines.common.tables import Table

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text", "image_to_class": "image to class"}
CHANGE_TITLES = {
    "half_of_words_dropped": "half of the words dropped",
    "first_sentence_dropped": "first sentence dropped",
    "sentences_shuffled": "sentences shuffled",
    "two_sentences_sampled": "two sentences sampled",
    "three_sentences_sampled": "three sentences sampled",
    "first_sentence_fourth": "first sentence moved to fourth place",
}
SCORE_TITLES = {
    "all": "all questions",
    "text_only": "texts alone",
    "himo@2": "HiMo@2 (similarity grows from the first half to the whole)",
    "himo@3": "HiMo@3 (similarity grows with each third)",
    "himo@k": "HiMo@K (100 x correlation of similarity with length)",
}
NEGATIVE_TITLES = {"replaced": "replaced by another one", "exchanged": "two exchanged"}


def render_markdown(title: str, results: Sequence[dict[str, Any]], missing: Table | None = None) -> str:
    """The report as Markdown; `missing` says what is not measured yet."""
    parts = [f"# {title}", *([missing.markdown()] if missing else [])]
    for result in results:
        parts += [f"## {result['task']}: {result['protocol']}", " ".join(_facts(result))]
        parts += [table.markdown() for table in tables(result)]
    return "\n\n".join(parts) + "\n"


def render_html(title: str, results: Sequence[dict[str, Any]], missing: Table | None = None) -> str:
    """The report as one HTML file, with the content of `render_markdown` and plots; all texts are escaped."""
    sections = [{"heading": "Progress", "facts": [], "tables": [missing], "plot": ""}] if missing else []
    sections += [
        {
            "heading": f"{result['task']}: {result['protocol']}",
            "facts": _facts(result),
            "tables": list(tables(result)),
            "plot": recall_plot(result),
        }
        for result in results
    ]
    return TEMPLATES.get_template("evaluation/report.html").render(title=title, sections=sections)


def progress_table(measured: Mapping[str, Collection[str]], models: Collection[str]) -> Table:
    """Which models are measured on which tasks, by the names of the tasks."""
    done = sum(map(len, measured.values()))
    return Table(
        f"Unfinished: {done} of {len(measured) * len(models)} measurements are done",
        ["task", *models],
        [[task, *("done" if model in names else "" for model in models)] for task, names in measured.items()],
        words=1 + len(models),
    )


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """All tables of a task."""
    yield from _recall_table(result)
    yield from _score_table(result)
    if result["comparisons"]:
        yield Table(
            f"Against {result['comparisons'][0]['base']}, the same queries, {_figures_of(result['comparisons'])}",
            ["model", "direction", "change, points", "better", "worse", "p (paired)"],
            [
                [line["model"], title_of(line["direction"]), change_text(line), *_counts(line)]
                for line in result["comparisons"]
            ],
            words=2,
        )
    if result["paper_figures"]:
        yield Table(
            f"Against the papers' figures, {_figures_of(result['paper_figures'])}",
            ["model", "direction", "model of the paper", "source", "paper", "measured", "difference", "verdict"],
            [
                [
                    *(line["model"], title_of(line["direction"]), line["paper_model"], line["source"]),
                    *(f"{line['paper']:.1f}", f"{line['measured']:.1f}", f"{line['difference']:+.1f}"),
                    "reproduced" if line["reproduced"] else "not reproduced",
                ]
                for line in result["paper_figures"]
            ],
            words=4,
        )
    yield from _long_text_tables(result)
    yield from _hard_negative_tables(result)


def title_of(name: str) -> str:
    """A direction or score in words."""
    direction, _, figure = name.partition("/")
    words = DIRECTIONS.get(direction) or SCORE_TITLES.get(direction) or direction.replace("_", " ")
    return f"{words}, {figure}" if figure else words


def _figures_of(lines: Sequence[dict[str, Any]]) -> str:
    names = {"recall@1": "at 1", "score": "by score"}
    return " and ".join(name for figure, name in names.items() if any(line["figure"] == figure for line in lines))


def _recall_table(result: dict[str, Any]) -> Iterator[Table]:
    directions = [
        (model, direction, figures)
        for model, model_result in result["models"].items()
        for direction, figures in model_result["directions"].items()
    ]
    if not directions:
        return
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


def _score_table(result: dict[str, Any]) -> Iterator[Table]:
    rows = [
        [
            *(model, title_of(name), _percent(score), str(score["queries"])),
            "" if score["chance"] is None else f"{100 * score['chance']:.1f}",
        ]
        for model, model_result in result["models"].items()
        for name, score in model_result["scores"].items()
    ]
    if rows:
        yield Table(
            "Scores in percent, with 95 % intervals over images; equal similarities are not right",
            ["model", "score", "percent", "questions", "chance"],
            rows,
            words=2,
        )


def _long_text_tables(result: dict[str, Any]) -> Iterator[Table]:
    lengths = _lengths(result)
    if not lengths:
        return
    studied = [
        (model, direction, long_text)
        for model, model_result in result["models"].items()
        for direction, long_text in model_result.get("long_text", {}).items()
    ]
    yield Table(
        "Recall at 1 by maximum tokens. At and above the effective length, at most"
        f" {100 * studied[0][2]['effective_length_margin']:g} points are lost against the whole text (95 % interval);"
        " below it, the loss is significant (paired test, p < 0.05)",
        ["model", "direction", *map(str, lengths), "effective length"],
        [
            [
                *(model, DIRECTIONS[direction]),
                *[_at(long_text["recall@1"], tokens) for tokens in lengths],
                str(long_text["effective_length"] or long_text["effective_length_reason"].partition(":")[0]),
            ]
            for model, direction, long_text in studied
        ],
        words=2,
    )
    yield Table(
        "Recall at 1 with perturbed texts, the mean of the draws; its change, also relative to the recall of the whole"
        " text, with 95 % intervals over images and draws; texts too short for a perturbation are left as they are",
        [
            *("model", "direction", "perturbation", "draws", "R@1", "relative, percent", "change, points"),
            *("p (paired)", "too short"),
        ],
        [
            [
                *(model, DIRECTIONS[direction], CHANGE_TITLES[name], str(line["draws"])),
                *(f"{100 * line['recall@1']:.1f}", _relative(line["relative_change"]), change_text(line)),
                *(f"{line['p_value']:.4f}", str(line["texts_unchanged"])),
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
        for model, model_result in result["models"].items()
        for kind, line in model_result.get("hard_negatives", {}).items()
    ]
    if rows:
        yield Table(
            "Images closer to their caption than to one with an attribute changed after token 77, in percent"
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
    """All maximum lengths of all models, in order."""
    studies = [model_result["long_text"] for model_result in result["models"].values() if "long_text" in model_result]
    return sorted({point["tokens"] for study in studies for line in study.values() for point in line["recall@1"]})


def _facts(result: dict[str, Any]) -> list[str]:
    """Sentences about what was measured, first of all the numbers of candidates."""
    model_result = next(iter(result["models"].values()))
    candidates = {
        DIRECTIONS[direction]: figures["candidates"] for direction, figures in model_result["directions"].items()
    }
    facts = [f"{result['title']}." if result["title"] != result["task"] else ""]
    counts = f"{model_result['images']} images" + (f", {model_result['texts']} texts" if model_result["texts"] else "")
    candidate_counts = ", ".join(f"{count} {name}" for name, count in candidates.items())
    facts.append(f"{counts}. Candidates: {candidate_counts}." if candidates else f"{counts}.")
    for model, measured in result["models"].items():
        cut = f", which cut {measured['texts_cut']} texts" if measured["texts_cut"] else ""
        facts.append(f"{model} reads {measured['context_length']} tokens{cut}.")
    return [fact for fact in [*facts, result["note"]] if fact]


def _percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def change_text(line: dict[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}]"


def _relative(change: dict[str, float | None]) -> str:
    """A relative change in percent with its interval, or why there is none."""
    if change["value"] is None:
        return "nothing found with the whole text"
    value = f"{100 * change['value']:+.1f}"
    if change["low"] is None or change["high"] is None:
        return f"{value} (too few hits for an interval)"
    return f"{value} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _counts(line: dict[str, float]) -> list[str]:
    return [str(line["better"]), str(line["worse"]), f"{line['p_value']:.4f}"]


def _at(points: Sequence[dict[str, float]], tokens: int) -> str:
    return next((f"{100 * point['value']:.1f}" for point in points if point["tokens"] == tokens), "")
