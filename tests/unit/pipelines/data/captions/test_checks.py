"""Which replies of a model become captions, and what the model is told about the others."""

import json
import time

import pytest

from longclip.tokenizer import count_tokens, load_tokenizer
from pipelines.common.chat_endpoint import Completion
from pipelines.data.captions.checks import Problem, clean_caption, judge
from pipelines.data.captions.drafts import Accepted, Ask, Failed, next_step
from pipelines.data.captions.languages import FUNCTION_WORDS, is_in_language
from pipelines.data.captions.settings import Checks
from tests.support.caption_server import GERMAN, description

GOOD = description(1)
SENTENCES = [f"{part}." for part in GOOD.removesuffix(".").split(". ")]
FRENCH = (
    "Sur cette image, un chien noir court dans l'herbe avec une balle rouge dans la gueule. Au fond, il y a des arbres"
    " et une maison dont le toit est gris. La lumière du soir est douce et les ombres sont longues."
)
RUSSIAN = "На фотографии чёрная собака бежит по зелёной траве с красным мячом, а за ней стоит старый деревянный дом."
CHINESE = "照片中一只黑色的狗在绿色的草地上奔跑，嘴里叼着一个红色的球，背景是一座灰色屋顶的房子和几棵高大的树木。"


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f'  "{GOOD}"\n',
        f"Sure! Here is a detailed description of the image:\n\n{GOOD}",
        f"Certainly! {GOOD}",
        f"Here's the revised caption:\n{GOOD}",
        f"**Caption:** {GOOD}",
        f"Description: {GOOD}",
        f"{GOOD} Let me know if you would like more details!",
        f"{GOOD}\n\nI hope this helps!",
        f"<think>What is in it? I can't say.\n- dog\n- cat</think>\n{GOOD}",
        f"```\n{GOOD}\n```",
        f"{GOOD}<|im_end|>",
        f"{GOOD}</s>",
        "\n\n".join([" ".join(SENTENCES[:5]), " ".join(SENTENCES[5:])]),
        f"*{SENTENCES[0]}* **{SENTENCES[1]}** {' '.join(SENTENCES[2:])}",
    ],
)
def test_what_is_not_part_of_the_caption_is_removed(reply: str) -> None:
    verdict = judge(reply, "stop", Checks(), last=False)
    assert (verdict.caption, verdict.problem, verdict.cut) == (GOOD, None, False)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "empty"),
        (" \n ... ", "empty"),
        (f"{GOOD} \ufffd", "not_text"),
        (f"{GOOD} \x00", "not_text"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I\u2019m unable to view images.", "refusal"),
        (f"As an AI language model, I cannot see. {GOOD}", "refusal"),
        (f"Unfortunately, the image is blurred. {GOOD}", "refusal"),
        (f"{GOOD} I cannot identify the person.", "refusal"),
        ("No image was provided. Please upload one.", "refusal"),
        ("\n".join(f"- {sentence}" for sentence in SENTENCES), "markup"),
        ("\n".join(f"{number}. {sentence}" for number, sentence in enumerate(SENTENCES, 1)), "markup"),
        (f"# Description\n{GOOD}", "markup"),
        (f"**Foreground:**\n{GOOD}", "markup"),
        (f"Overview:\n{GOOD}", "markup"),
        (json.dumps({"caption": GOOD}), "markup"),
        (f"```json\n{json.dumps({'caption': GOOD})}\n```", "markup"),
        (f"<p>{GOOD}</p>", "markup"),
        (f"| what | where |\n|---|---|\n{GOOD}", "markup"),
        (f"{GOOD} ![dog](https://example.com/dog.jpg)", "markup"),
        (f"{GOOD} {SENTENCES[0]} {SENTENCES[0]}", "repetition"),
        (f"{GOOD} and a tree and a tree and a tree and a tree", "repetition"),
        (f"{GOOD} {'la' * 60}", "repetition"),
        (" ".join(SENTENCES[:3] * 4), "repetition"),
        (GERMAN, "language"),
        (FRENCH, "language"),
        (RUSSIAN, "language"),
        (CHINESE, "language"),
        ("A dog on the grass.", "too_short"),
        (" ".join([GOOD, description(2)]), "too_long"),
    ],
)
def test_replies_that_are_not_captions_have_a_problem(reply: str, problem: Problem) -> None:
    assert judge(reply, "stop", Checks(), last=False).problem == problem


@pytest.mark.parametrize(
    "sentence",
    [
        'A sign on the wall says "I cannot believe it".',
        "Its label reads \u201cSorry, we are closed\u201d.",
        "The number 1. FC is printed on a scarf.",
        "I don't see any of the sun itself.",
        "A note says: buy milk.",
        "On the left, a well-lit room; on the right \u2013 a dark one.",
        "Seven 7 7 7 plates hang there.",
    ],
)
def test_odd_captions_are_accepted(sentence: str) -> None:
    verdict = judge(f"{GOOD} {sentence}", "stop", Checks(), last=False)
    assert (verdict.problem, verdict.caption) == (None, f"{GOOD} {sentence}")


def test_a_caption_that_is_too_long_is_cut_at_a_sentence() -> None:
    def tokens(text: str) -> int:
        return count_tokens(load_tokenizer(None, 248), [text])[0]

    a_little = description(3, 19)
    assert 230 < tokens(a_little) <= 248
    verdict = judge(a_little, "stop", Checks(), last=False)
    assert (verdict.problem, verdict.cut) == (None, True)
    assert verdict.tokens == tokens(verdict.caption) <= 230
    assert a_little.startswith(verdict.caption)
    assert verdict.caption.endswith(".")
    much = description(3, 24)
    assert judge(much, "stop", Checks(), last=False).problem == "too_long"
    assert judge(much, "stop", Checks(), last=True).cut
    endless = GOOD.replace(".", ",") + " and".join(GOOD.replace(".", ",").split(" a"))
    assert judge(endless, "stop", Checks(), last=True).problem is not None


def test_a_reply_that_was_cut_off_loses_its_last_sentence() -> None:
    begun = f"{GOOD} And then there is a"
    for finish_reason in ("length", None):
        assert judge(begun, finish_reason, Checks(), last=False).problem == "cut_off"
        verdict = judge(begun, finish_reason, Checks(), last=True)
        assert (verdict.caption, verdict.problem) == (GOOD, None)
    assert judge(GOOD, None, Checks(), last=False).problem is None
    assert judge(begun, "stop", Checks(), last=False).problem is None, "the model was done"
    assert judge("Seen are a dog, a cat and a", "length", Checks(), last=True).problem == "cut_off"
    for finish_reason in ("content_filter", "refusal"):
        assert judge(GOOD, finish_reason, Checks(), last=True).problem == "refusal"


def test_languages() -> None:
    assert is_in_language(GERMAN, "german")
    assert is_in_language(FRENCH, "French")
    assert not is_in_language(GERMAN, "French")
    assert not is_in_language(GOOD, "German")
    assert is_in_language(f"A sign says \u00ab{RUSSIAN[:20]}\u00bb. {GOOD}", "English")
    assert is_in_language(RUSSIAN, "Russian")
    assert is_in_language(CHINESE, "Chinese")
    assert not is_in_language(GOOD, "Russian"), "of other languages it is known that they are not English"
    assert not is_in_language(" ".join(f"qwrt{chr(97 + n)}x" for n in range(20)), "English")
    assert all(len(words) >= 20 for words in FUNCTION_WORDS.values())


def test_the_steps_of_a_row_depend_on_its_replies_alone() -> None:
    good, short, refused = (Completion(text, "stop") for text in (GOOD, "A dog.", "I cannot help with this."))
    long = Completion(description(4, 24), "stop")
    checks = Checks(attempts=3)
    assert next_step([], checks) == Ask()
    step = next_step([short], checks)
    assert isinstance(step, Ask)
    assert step.rejected == short
    assert step.problem.startswith(
        "That is too short: 5 tokens, where at least 100 are needed. Describe the image again"
    )
    step = next_step([short, good], checks)
    assert isinstance(step, Accepted)
    assert (step.verdict.caption, step.attempts) == (GOOD, 2)
    assert next_step([refused, short, refused], checks) == Failed(
        "no reply can be used as a caption: refusal, too_short"
    )
    step = next_step([long, refused, short], checks)
    assert isinstance(step, Accepted), "an earlier reply that is only too long is cut"
    assert step.verdict.cut


def test_clean_caption_keeps_quotations() -> None:
    text = '"Stop" is written on one sign, and on the other one "Go"'
    assert clean_caption(text) == text


@pytest.mark.parametrize(
    "thoughts",
    [
        "what they want\n</think>\n\n",
        "◁think▷a dog◁/think▷",
        "[THINK]a[/THINK]",
        "<thought>a\nb</thought>",
        "<think>a</think>",
    ],
)
def test_thoughts_and_the_tags_of_an_answer_are_no_markup(thoughts: str) -> None:
    caption = (
        "A dog runs over the grass in front of a fence, and a man with a hat looks at it from the door of a house."
    )
    for reply in (thoughts + caption, f"{thoughts}<answer>{caption}</answer>"):
        verdict = judge(reply, "stop", Checks(min_tokens=10), last=False)
        assert (verdict.caption, verdict.problem) == (caption, None)


@pytest.mark.parametrize("loop", ["a" + " " * 300_000, "1. a 2. b " * 30_000, "\n" * 300_000, " 1. 2. " * 9_000])
def test_replies_without_an_end_are_judged_at_once(loop: str) -> None:
    start = time.monotonic()
    assert judge(loop, "stop", Checks(), last=True).problem is not None
    assert time.monotonic() - start < 5
