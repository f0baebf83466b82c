"""Checks of summaries that a model wrote, against their captions."""

import pytest

from longclip.text.summary_checks import clean_summary, stem, summary_problem, unsupported

CAPTION = "A brown dog is running along a sandy beach. Two children in red jackets watch the waves. The sky is grey."


@pytest.mark.parametrize(
    ("answer", "summary"),
    [
        ("  A dog\n runs. ", "A dog runs."),
        ('"A dog runs."', "A dog runs."),
        ("\u201cA dog runs.\u201d", "A dog runs."),
        ("'A dog's ball'", "'A dog's ball'"),
        ('"Stop" is on a sign by "Bob"', '"Stop" is on a sign by "Bob"'),
        ("Summary: a dog", "a dog"),
        ('**Summary:** "A dog."', "A dog."),
        ("Short summary: `a dog`", "a dog"),
        ("A dog in summary: brown", "A dog in summary: brown"),
        ("<think>The user\nwants</think>\n\nA dog.", "A dog."),
        ('""', '""'),
        ("Summary:", ""),
        ("", ""),
    ],
)
def test_answers_are_cleaned(answer: str, summary: str) -> None:
    assert clean_summary(answer) == summary
    assert clean_summary(summary) == summary


@pytest.mark.parametrize(
    ("summary", "problem"),
    [
        ("A dog runs on a beach, and children watch.", None),
        ("A scene showing dogs and a child in a red jacket.", None),
        ("", "empty"),
        ('"..."', "empty"),
        ("A dog.", "too_short"),
        (CAPTION, "copy"),
        (CAPTION.lower().replace(".", ","), "copy"),
        (CAPTION.removesuffix(" grey."), "copy"),
        ("A black cat is sleeping on a warm sofa.", "ungrounded"),
        ("I cannot see any images, sorry.", "ungrounded"),
        ("A brown dog is running along a sandy beach with a yellow ball.", "ungrounded"),
    ],
)
def test_problems_of_summaries(summary: str, problem: str | None) -> None:
    assert summary_problem(summary, CAPTION, tokens=20) == problem


def test_limits_of_the_checks() -> None:
    summary = "A brown dog is running along a sandy beach with a yellow ball."  # 2 of 7 content words are not there
    assert summary_problem(summary, CAPTION, tokens=20, max_unsupported=0.3) is None
    assert summary_problem(summary, CAPTION, tokens=78, max_unsupported=0.3) == "too_long"
    assert summary_problem(summary, CAPTION, tokens=77, max_unsupported=0.3) is None
    assert summary_problem("A dog.", CAPTION, tokens=5, min_words=2) is None
    assert summary_problem("A brown dog is running along a sandy beach.", CAPTION, tokens=20, max_copied=0.4) == "copy"


def test_a_short_caption_may_be_its_own_summary() -> None:
    assert summary_problem("A red bus.", "A red bus.", tokens=5) is None
    assert summary_problem("Bus.", "Bus.", tokens=3) is None
    assert summary_problem("A red bus waits in rain.", "A red bus waits. In rain.", tokens=9) == "copy"


@pytest.mark.parametrize(
    "forms",
    [
        "dog dogs dog's",
        "run runs running",
        "ride rides riding",
        "stop stops stopped stopping",
        "smile smiles smiled smiling",
        "carry carries carried carrying",
        "bus buses",
        "glass glasses",
        "dress dresses dressed",
        "dish dishes",
        "box boxes",
        "horse horses",
        "building buildings",
        "speed speeds",
        "string strings",
        "city cities",
        "cookie cookies",
        "man men",
        "child children",
    ],
)
def test_forms_of_a_word_share_a_stem(forms: str) -> None:
    assert len({stem(form) for form in forms.split()}) == 1


def test_different_words_keep_different_stems() -> None:
    words = "dog cat bus building bird red bed car care ring sing king boat boot sky sea tree three"
    stems = [stem(word) for word in words.split()]
    # `car` and `care` fall together: the price of cutting the e that `riding` has lost.
    assert len(set(stems)) == len(stems) - 1


def test_share_of_unsupported_words() -> None:
    assert unsupported("Two dogs and a cat", "A dog.") == 0.5
    assert unsupported("The image shows well-kept lawns", "A lawn, kept well.") == 0
    assert unsupported("It is.", "A dog.") == 0
