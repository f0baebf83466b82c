"""Synthetic scenes: drawings with a long paragraph and a short caption, in any number.

They run the whole system without a download, and test what long text adds. A scene has four things in the four
quarters of a drawing. The paragraph describes them in turn and ends with a sentence that sums up; its first 77 tokens
mention only the first two things. Scenes of one group share these two and the words about them, so a model that reads
77 tokens cannot distinguish the members of a group. None of them is a photograph, and results on them do not transfer
to photographs.
"""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

CANVAS = 112
"""Side of a drawing in pixels; it is drawn at four times the size and reduced, for smooth edges."""

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 208, 44),
    "green": (56, 142, 60),
    "blue": (33, 110, 220),
    "purple": (123, 44, 191),
    "pink": (255, 128, 190),
    "brown": (121, 85, 60),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (18, 18, 18), "grey": (160, 160, 160), "beige": (236, 222, 190)}
PALE = (255, 255, 255)
SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "diamond": "diamonds",
}
NUMBERS = {1: "one", 2: "two", 3: "three"}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
TEXTURES = {
    "plain": ("evenly filled with that colour", "painted flat, without any pattern"),
    "striped": ("covered in pale stripes", "crossed by light stripes from side to side"),
    "hollow": ("drawn as an outline only", "hollow, with nothing but the outline drawn"),
}
OPENINGS = (
    "This is a simple drawing of a few shapes on a {background} background.",
    "Somebody arranged several shapes in the quarters of a {background} sheet.",
    "We are looking at a picture that is divided into four quarters, all of them {background} behind the shapes.",
    "On a {background} ground there are shapes in every quarter of the picture.",
)
PLACED = (
    "In the {quarter} quarter there {be} {thing}.",
    "The {quarter} quarter shows {thing}.",
    "Looking at the {quarter}, one finds {thing}.",
)
RELATED = {
    "right": "Directly to the right of {it} there {be} {thing}.",
    "left": "Directly to the left of {it} there {be} {thing}.",
    "below": "Right below {it} there {be} {thing}.",
    "above": "Right above {it} there {be} {thing}.",
    "across": "Diagonally across from {it} there {be} {thing}.",
}
REMARKS = (
    "The edges are clean and nothing overlaps.",
    "There is plenty of room around it.",
    "The light is even and there are no shadows to be seen.",
    "No frame surrounds the picture, and no text is written anywhere.",
    "It looks like something cut out of coloured paper.",
    "The line work is steady, as if a ruler had been used.",
    "Nobody has signed the sheet.",
    "The picture is calm and well balanced at first sight.",
)
CLOSINGS = (
    "All in all there are {things} on {background}.",
    "Taken together the sheet shows {things} against {background}.",
    "So the whole picture holds {things}, all on {background}.",
)
HEAD_TOKENS, MIN_TOKENS = 77, 100


@dataclass(frozen=True)
class Thing:
    """The shapes in one quarter."""

    shape: str
    colour: str
    count: int
    large: bool
    texture: str
    quarter: int

    @property
    def short_name(self) -> str:
        """For example `two red circles`."""
        return f"{NUMBERS[self.count]} {self.colour} {self.noun}"

    @property
    def long_name(self) -> str:
        """For example `two small red circles`."""
        return f"{NUMBERS[self.count]} {'large' if self.large else 'small'} {self.colour} {self.noun}"

    @property
    def noun(self) -> str:
        """The shape, in the plural if there are several."""
        return self.shape if self.count == 1 else SHAPES[self.shape]


@dataclass(frozen=True)
class Scene:
    """A drawing and its texts."""

    background: str
    things: tuple[Thing, ...]
    caption: str
    short_caption: str
    group: int


def draw_scene(seed: int, index: int, group_size: int, count_tokens: Callable[[str], int]) -> Scene:
    """Scene number `index` in the endless series of a seed; independent of the other scenes drawn.

    Args:
        seed: seed of the series.
        index: number of the scene, from 0.
        group_size: number of consecutive scenes that share their first two things and the words about them.
        count_tokens: number of CLIP tokens in a text, including start and end token.
    """
    group = index // group_size
    shared = random.Random(f"{seed}/{group_size}/{group}")
    individual = random.Random(f"{seed}/{group_size}/{group}/{index}")
    background = shared.choice(sorted(BACKGROUNDS))
    quarters = shared.sample(range(4), 4)
    first = [_draw_thing(shared, quarter) for quarter in quarters[:2]]
    head = shared.choice(OPENINGS).format(background=background)
    head += f" {_describe(shared, first[0], None)} {_describe(shared, first[1], first[0])}"
    remarks = shared.sample(REMARKS, len(REMARKS))
    while count_tokens(head) <= HEAD_TOKENS:  # the end token takes one of the 77
        head += f" {remarks.pop()}"

    last = [_draw_thing(individual, quarter) for quarter in individual.sample(quarters[2:], 2)]
    caption = f"{head} {_describe(individual, last[0], None)} {_describe(individual, last[1], last[0])}"
    while remarks and (count_tokens(caption) < MIN_TOKENS or individual.random() < 0.2):
        caption += f" {remarks.pop()}"
    things = (*first, *last)
    caption += f" {individual.choice(CLOSINGS).format(things=_enumerate(individual, things), background=background)}"
    short_caption = f"{_enumerate(individual, things)} on {background}"
    return Scene(background, things, caption, short_caption[:1].upper() + short_caption[1:], group)


def _enumerate(rng: random.Random, things: tuple[Thing, ...]) -> str:
    """The short names of the things in random order."""
    *others, last = (thing.short_name for thing in rng.sample(things, len(things)))
    return f"{', '.join(others)} and {last}"


def _draw_thing(rng: random.Random, quarter: int) -> Thing:
    count = rng.choice((1, 1, 2, 3))
    return Thing(
        shape=rng.choice(sorted(SHAPES)),
        colour=rng.choice(sorted(COLOURS)),
        count=count,
        large=count == 1 and rng.random() < 0.5,
        texture=rng.choice(sorted(TEXTURES)),
        quarter=quarter,
    )


def _describe(rng: random.Random, thing: Thing, before: Thing | None) -> str:
    """Two sentences: where the thing is, absolute or relative to `before`, and its texture."""
    be = "is" if thing.count == 1 else "are"
    if before is not None and rng.random() < 0.5:
        it = "it" if before.count == 1 else "them"
        place = RELATED[_relation(before.quarter, thing.quarter)].format(it=it, be=be, thing=thing.long_name)
    else:
        place = rng.choice(PLACED).format(quarter=QUARTERS[thing.quarter], be=be, thing=thing.long_name)
    subject = f"The {thing.noun} {be}"
    return f"{place} {subject} {rng.choice(TEXTURES[thing.texture])}."


def _relation(origin: int, other: int) -> str:
    (row, column), (other_row, other_column) = divmod(origin, 2), divmod(other, 2)
    if row == other_row:
        return "right" if other_column > column else "left"
    if column == other_column:
        return "below" if other_row > row else "above"
    return "across"


def render_scene(scene: Scene) -> bytes:
    """The drawing as a PNG file of `CANVAS` x `CANVAS` pixels."""
    scale = 4
    side = CANVAS * scale
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for thing in scene.things:
        row, column = divmod(thing.quarter, 2)
        middle = ((column + 0.5) * side / 2, (row + 0.5) * side / 2)
        radius = side * (0.2 if thing.large else 0.11)
        for x, y in _spread(middle, thing.count, side * 0.115):
            _draw_shape(canvas, thing, x, y, radius)
    out = io.BytesIO()
    canvas.reduce(scale).save(out, "PNG")
    return out.getvalue()


def _spread(middle: tuple[float, float], count: int, step: float) -> list[tuple[float, float]]:
    """Centres of one to three copies around the middle of a quarter."""
    x, y = middle
    offsets: dict[int, list[tuple[float, float]]] = {
        1: [(0, 0)],
        2: [(-1, -0.5), (1, 0.5)],
        3: [(-1, -0.9), (1, -0.9), (0, 0.95)],
    }
    return [(x + step * dx, y + step * dy) for dx, dy in offsets[count]]


def _draw_shape(canvas: Image.Image, thing: Thing, x: float, y: float, r: float) -> None:
    """Paint one copy of a thing: a tile in its colours, pasted through a mask of its shape."""
    side = int(2 * r) + 1
    mask = Image.new("L", (side, side), 0)
    _fill_shape(ImageDraw.Draw(mask), thing.shape, r, 1.0, 255)
    if thing.texture == "hollow":
        _fill_shape(ImageDraw.Draw(mask), thing.shape, r, 0.64, 0)
    colour = COLOURS[thing.colour]
    tile = Image.new("RGB", (side, side), colour)
    if thing.texture == "striped":
        stripes = ImageDraw.Draw(tile)
        width = max(6, int(r * 0.22))
        for top in range(width, side, 2 * width + width // 2):
            stripes.rectangle((0, top, side, top + width - 1), fill=_mix(colour, PALE, 0.67))
    canvas.paste(tile, (int(x - r), int(y - r)), mask)


def _fill_shape(draw: ImageDraw.ImageDraw, shape: str, r: float, scale: float, value: int) -> None:
    if shape == "circle":
        draw.ellipse((r - r * scale, r - r * scale, r + r * scale, r + r * scale), fill=value)
    else:
        draw.polygon([(r + r * scale * dx, r + r * scale * dy) for dx, dy in _outline(shape)], fill=value)


def _mix(colour: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the square from (-1, -1) to (1, 1); y points down."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if shape == "cross":
        a = 0.34
        arm = [(-a, -1.0), (a, -1.0), (a, -a)]  # the upper arm; the others are quarter turns of it
        return [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in arm]
    star = [(0, -1), (0.24, -0.31), (0.95, -0.31), (0.38, 0.12), (0.59, 0.81)]
    star += [(0, 0.4), (-0.59, 0.81), (-0.38, 0.12), (-0.95, -0.31), (-0.24, -0.31)]
    return star
