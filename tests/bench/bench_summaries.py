"""Summaries per second and core of each strategy that needs no download, over long captions.

The rival is the official code's way: the text in front of the first full stop and blank. First, strategy first_sentence
is compared with it: a difference ends the benchmark with exit code 1.

    python tests/bench/bench_summaries.py [--quick]

The last line is JSON; `ratio` is rows per second of `extractive`, the default, over the official way's, and
`rows_per_second` has all. `extractive_embedding` (a network) runs on fewer captions.
"""

import importlib.util
import sys
from functools import partial

import torch

from harness import alternating, arguments, report
from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.data.scenes import draw_scene
from pipelines.data.summaries.sentence_embedding import PACKAGE
from pipelines.data.summaries.settings import MODEL_FREE, SummarySettings
from pipelines.data.summaries.summarizers import load_summarizer


def main() -> None:
    """Compare, measure, report."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(None, 248)
    count = 400 if quick else 2000
    captions = [draw_scene(0, row, 1, lambda text: count_tokens(tokenizer, [text])[0]).caption for row in range(count)]
    keys = [str(row) for row in range(count)]
    strategies: dict[str, list[str]] = dict.fromkeys(MODEL_FREE, captions)
    if importlib.util.find_spec(PACKAGE) is not None:
        strategies["extractive_embedding"] = captions[: count // 20]
    summarizers = {name: load_summarizer(name, SummarySettings(strategy=name)) for name in strategies}
    if summarizers["first_sentence"](captions, keys) != official(captions):
        sys.exit("error: first_sentence differs from the official code's first sentence")

    rivals = {name: partial(summarizers[name], texts, keys[: len(texts)]) for name, texts in strategies.items()}
    seconds = alternating({"official": partial(official, captions), **rivals}, 3 if quick else 7)
    rows = {name: len(strategies.get(name, captions)) / each for name, each in seconds.items()}
    report(
        "summaries",
        quick,
        ratio=round(rows["extractive"] / rows["official"], 5),
        rows_per_second={name: round(rate, 1) for name, rate in rows.items()},
        captions=count,
        mean_characters=sum(map(len, captions)) // count,
    )


def official(captions: list[str]) -> list[str]:
    """The text in front of the first full stop and blank."""
    return [caption.split(". ")[0] for caption in captions]


if __name__ == "__main__":
    main()
