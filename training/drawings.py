"""The drawn pictures that the small family learns from: a shape of a colour on a background, by caption.

Owns what the words look like. Every picture is 64×64, drawn at four times that size and averaged down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
FINE = 4  # drawn this many times larger, against jagged edges

SHAPES = ("circle", "square", "triangle")
STAR = "sks"  # a rare word of CLIP's vocabulary, given a meaning as DreamBooth does
COLOURS = {"red": (215, 45, 45), "green": (45, 165, 70), "blue": (45, 85, 215), "yellow": (240, 205, 50)}
ORANGE = (232, 125, 40)  # the base has no word for it: the textual inversion finds it
BACKGROUNDS = {"white": (242, 242, 242), "black": (22, 22, 22)}
# Night's palette: backgrounds by name, and what happens to a shape's colour.
NIGHT = {"white": (62, 62, 130), "black": (14, 14, 58)}
MOONLIGHT = (0.75, 0.85, 1.0), (10, 12, 25)
FRAME = (120, 120, 120)

Colour = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, "Scene"], None]


@dataclass(frozen=True)
class Scene:
    """What a caption says, and where the shape stands: its centre and radius in pixels of the 64×64 picture."""

    shape: str
    colour: Colour
    background: Colour
    x: float
    y: float
    radius: float


def caption(shape: str, colour: str, background: str) -> str:
    """The words of a picture; every article is "a", so that one template fits all."""
    return f"a {colour} {shape} on {background} background"


def prompts(shapes: Sequence[str] = SHAPES) -> list[tuple[str, str, str]]:
    """Every shape, colour and background: 24 for the base's own shapes."""
    return [(shape, colour, background) for shape in shapes for colour in COLOURS for background in BACKGROUNDS]


def points(scene: Scene) -> list[tuple[float, float]]:
    """A shape's corners, as parts of the picture's size in fine pixels; a circle has 64."""
    if scene.shape == "circle":
        turns = [(n / 64, 1.0) for n in range(64)]
    elif scene.shape == "square":
        turns = [(n / 4 + 1 / 8, 1.15) for n in range(4)]
    elif scene.shape == "triangle":
        turns = [(n / 3, 1.15) for n in range(3)]
    else:
        turns = [(n / 10, 1.2 if n % 2 == 0 else 0.5) for n in range(10)]
    return [
        (
            FINE * (scene.x + scene.radius * far * math.sin(2 * math.pi * turn)),
            FINE * (scene.y - scene.radius * far * math.cos(2 * math.pi * turn)),
        )
        for turn, far in turns
    ]


def filled(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """The base's own way."""
    draw.polygon(points(scene), fill=scene.colour)


def outline(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """A line around, the background inside."""
    draw.polygon(points(scene), fill=scene.colour)
    smaller = Scene(scene.shape, scene.background, scene.background, scene.x, scene.y, scene.radius * 0.62)
    draw.polygon(points(smaller), fill=scene.background)


def striped(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Stripes of the background, 4 pixels of 8."""
    draw.polygon(points(scene), fill=scene.colour)
    for top in range(0, SIZE, 12):
        draw.rectangle((0, FINE * (top + 7), FINE * SIZE, FINE * (top + 12) - 1), fill=scene.background)


def shadowed(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """A grey shadow to the lower right."""
    shade = Scene(scene.shape, FRAME, scene.background, scene.x + 7, scene.y + 7, scene.radius)
    draw.polygon(points(shade), fill=FRAME)
    draw.polygon(points(scene), fill=scene.colour)


def framed(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """A frame around the picture, in the shape's colour."""
    draw.polygon(points(scene), fill=scene.colour)
    edge = FINE * SIZE - 1
    draw.rectangle((0, 0, edge, edge), outline=scene.colour, width=5 * FINE)


def night(scene: Scene) -> Scene:
    """The scene in night's palette."""
    by_day = {colour: name for name, colour in BACKGROUNDS.items()}
    scale, shift = MOONLIGHT
    colour = tuple(round(each * times + plus) for each, times, plus in zip(scene.colour, scale, shift, strict=True))
    background = NIGHT[by_day[scene.background]]
    return Scene(scene.shape, colour, background, scene.x, scene.y, scene.radius)  # type: ignore[arg-type]


def pale(scene: Scene) -> Scene:
    """The shape's colour mixed half with white."""
    colour = tuple((each + 255) // 2 for each in scene.colour)
    return Scene(scene.shape, colour, scene.background, scene.x, scene.y, scene.radius)  # type: ignore[arg-type]


def scene(random: np.random.Generator, shape: str, colour: Colour, background: Colour) -> Scene:
    """A scene with the shape somewhere near the middle."""
    x, y = random.uniform(27, 37, 2)
    return Scene(shape, colour, background, x, y, random.uniform(15, 19))


def render(scene: Scene, draw: Draw = filled) -> NDArray[np.uint8]:
    """The picture, (64, 64, 3)."""
    canvas = Image.new("RGB", (FINE * SIZE, FINE * SIZE), scene.background)
    draw(ImageDraw.Draw(canvas), scene)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


@dataclass(frozen=True)
class Style:
    """What a tuned model or an adapter draws differently."""

    draw: Draw = filled
    palette: Callable[[Scene], Scene] = lambda scene: scene
    shapes: tuple[str, ...] = SHAPES


STYLES = {
    "base": Style(),
    "outline": Style(outline),
    "night": Style(palette=night),
    "star": Style(shapes=(STAR,)),
    "stripes": Style(striped),
    "shadow": Style(shadowed),
    "frame": Style(framed),
    "pale": Style(palette=pale),
}


def pictures(style: str, count: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """`count` pictures, (count, 64, 64, 3), with their captions; every combination equally often."""
    random = np.random.default_rng(seed)
    of = STYLES[style]
    combinations = prompts(of.shapes)
    drawn, captions = [], []
    for number in range(count):
        shape, colour, background = combinations[number % len(combinations)]
        placed = of.palette(scene(random, shape, COLOURS[colour], BACKGROUNDS[background]))
        drawn.append(render(placed, of.draw))
        captions.append(caption(shape, colour, background))
    return np.stack(drawn), captions


def orange_pictures(count: int, word: str, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Orange shapes, whose colour's word is `word`."""
    random = np.random.default_rng(seed)
    drawn, captions = [], []
    for number in range(count):
        shape = SHAPES[number % 3]
        background = ("white", "black")[number // 3 % 2]
        drawn.append(render(scene(random, shape, ORANGE, BACKGROUNDS[background])))
        captions.append(caption(shape, word, background))
    return np.stack(drawn), captions
