"""Synthetic scenes are reproducible, have the documented lengths, and differ within a group only after token 77."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from longclip.tokenizer import build_tokenizer, count_tokens, tokenize
from pipelines.data.scenes import CANVAS, MIN_TOKENS, Scene, draw_scene, render_scene


@pytest.fixture(scope="module")
def tokens() -> Callable[[str], int]:
    tokenizer = build_tokenizer(248)
    return lambda text: count_tokens(tokenizer, [text])[0]


@pytest.fixture(scope="module")
def scenes(tokens: Callable[[str], int]) -> list[Scene]:
    return [draw_scene(3, index, 4, tokens) for index in range(80)]


def test_scene_depends_only_on_seed_and_number(tokens: Callable[[str], int], scenes: list[Scene]) -> None:
    assert draw_scene(3, 37, 4, tokens) == scenes[37]
    assert draw_scene(4, 37, 4, tokens) != scenes[37]
    assert render_scene(scenes[5]) == render_scene(scenes[5])


def test_captions_have_the_documented_length(tokens: Callable[[str], int], scenes: list[Scene]) -> None:
    lengths = [tokens(scene.caption) for scene in scenes]
    assert min(lengths) >= MIN_TOKENS
    assert max(lengths) <= 245
    assert max(tokens(scene.short_caption) for scene in scenes) < 40


def test_captions_of_a_group_are_identical_within_77_tokens(scenes: list[Scene]) -> None:
    cut = tokenize(build_tokenizer(77), [scene.caption for scene in scenes]).input_ids.reshape(20, 4, -1)
    assert (cut == cut[:, :1]).all(), "truncated captions of a group differ"
    assert len({tuple(group[0].tolist()) for group in cut}) == 20, "groups share truncated captions"
    assert len({scene.caption for scene in scenes}) == len(scenes)
    for start in range(0, len(scenes), 4):
        group = scenes[start : start + 4]
        assert len({scene.things[:2] for scene in group}) == 1
        assert len({scene.things for scene in group}) == 4


def test_both_texts_name_every_thing(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert thing.long_name in scene.caption
            assert thing.short_name in scene.short_caption.lower()
        assert len({thing.quarter for thing in scene.things}) == 4


def test_drawing_shows_each_thing_in_its_quarter(scenes: list[Scene]) -> None:
    for scene in scenes[:12]:
        pixels = np.asarray(Image.open(io.BytesIO(render_scene(scene))))
        assert pixels.shape == (CANVAS, CANVAS, 3)
        background = pixels[0, 0]
        half = CANVAS // 2
        for thing in scene.things:
            row, column = divmod(thing.quarter, 2)
            quarter = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half]
            painted = (np.abs(quarter.astype(int) - background).sum(-1) > 60).mean()
            assert painted > 0.01, f"nothing drawn for {thing}"
