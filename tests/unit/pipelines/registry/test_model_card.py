"""The model card: what is recorded and what is not, sections that change, and the limit of MLflow's databases."""

from pathlib import Path
from typing import Any

import pytest

from longclip.checkpoint import Checkpoint, checkpoint_id, save_checkpoint
from longclip.lineage import Lineage
from pipelines.registry.model_card import MAX_DESCRIPTION, description, model_card, with_section

SETTINGS = {"input": "/data/clean", "output": "/data/run", "model": {"base": "/data/base", "architecture": None}}
LINEAGE = Lineage("r1", "d2", "manifest", "clip-b16", "c3", "r0", "0.1.0", "abc")


@pytest.mark.parametrize(
    ("metadata", "here", "expected"),
    [
        (
            {"settings": SETTINGS, **LINEAGE.metadata()},
            True,
            [
                "- training run: `r1`, the source run of this version",
                "- data: `/data/clean`, digest `d2` of its manifest",
                "- base: `clip-b16`, checkpoint `c3`, trained by run `r0`",
                "- code: longclip 0.1.0, commit `abc`",
            ],
        ),
        (
            {"settings": SETTINGS, **LINEAGE.metadata()},
            False,
            ["- training run: `r1`, not on this tracking server; the source run of this version is its registration"],
        ),
        (
            {"settings": SETTINGS},
            False,
            [
                "- training run: not recorded; the source run of this version is its registration",
                "- data: `/data/clean`\n",
                "- base: `/data/base`\n",
                "- code: not recorded",
            ],
        ),
        ({"settings": {"model": {"architecture": {}}}}, False, ["- base: not recorded"]),
        ({"settings": {"model": {"architecture": {"text": 1}}}}, False, ["- base: trained from scratch"]),
        ({"source": "longclip-B.pt"}, False, ["- base: converted from `longclip-B.pt`", "- data: not recorded"]),
        ({}, False, ["- base: not recorded", "- data: not recorded", "## Limits"]),
    ],
)
def test_the_card_says_what_is_recorded_and_what_is_not(
    tmp_path: Path, tiny_checkpoint: Checkpoint, metadata: dict[str, Any], here: bool, expected: list[str]
) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(tiny_checkpoint, directory, metadata)
    card = model_card("longclip", directory, checkpoint_id(directory), [], here)
    assert f"- checkpoint: `{checkpoint_id(directory)}`" in card
    assert [line for line in expected if line not in card] == []


def test_sections_are_added_before_the_limits_and_replaced() -> None:
    card = "# m\n\nfacts\n\n## Measured\n\nnothing\n\n## Limits\n\nsome\n\n## Recipe\n\n```yaml\na: 1\n```\n"
    once = with_section(card, "Promotion", "first\n")
    assert once.index("## Measured") < once.index("## Promotion") < once.index("## Limits")
    twice = with_section(once, "Promotion", "second")
    assert twice == once.replace("first", "second")
    assert with_section("# m\n", "Promotion", "x") == "# m\n\n## Promotion\n\nx\n"
    assert "Recipe" not in description(twice)


def test_a_long_card_is_cut_to_what_the_database_keeps_and_says_so() -> None:
    card = with_section("# m\n\n## Limits\n\nsome\n", "Measured", "\n".join(f"| line {n} | 1 |" for n in range(900)))
    text = description(card)
    assert MAX_DESCRIPTION - 100 < len(text) <= MAX_DESCRIPTION
    assert "the whole card is `artifacts/README.md`" in text
    short = with_section("# m\n", "Measured", "little")
    assert description(short) == short
