"""Drawn scenes: one coloured figure on a pale ground, drawn with Pillow from a seed.

A scene is a combination of four attributes (figure, colour, size, place). Everything else about the picture, such
as the exact hue, the rotation, the offset and the shading of the ground, varies with the seed.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    Point = tuple[float, float]
    Polygon = Sequence[Point]

FIGURES = ("circle", "square", "star", "heart", "fish", "tree")
COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "middle")

IMAGE_SIZE = 96  # pixels, width and height
_OVERSAMPLING = 2  # drawn this many times larger, then averaged: smooth edges

_CENTRES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "middle": (0.5, 0.5)}
_RADII = {"small": (0.115, 0.14), "large": (0.2, 0.23)}  # share of the image's width
_HUES = {
    "red": (-0.02, 0.02),
    "green": (0.3, 0.38),
    "blue": (0.58, 0.64),
    "yellow": (0.135, 0.165),
    "purple": (0.76, 0.81),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a caption says of a scene."""

    figure: str
    colour: str
    size: str
    place: str


COMBINATIONS = tuple(
    Attributes(figure=figure, colour=colour, size=size, place=place)
    for figure, colour, size, place in product(FIGURES, COLOURS, SIZES, PLACES)
)


def near_misses(attributes: Attributes) -> list[Attributes]:
    """The combinations that differ in exactly one attribute."""
    return [other for other in COMBINATIONS if len(differing(attributes, other)) == 1]


def differing(one: Attributes, other: Attributes) -> list[str]:
    """The names of the attributes in which two combinations differ."""
    return [field.name for field in fields(Attributes) if getattr(one, field.name) != getattr(other, field.name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnImage:
    """An ImageRef that draws its scene; equal seeds and attributes give equal pixels."""

    attributes: Attributes
    seed: str

    def load(self) -> "Image":
        """Draw the scene as RGB, IMAGE_SIZE x IMAGE_SIZE."""
        return draw(self.attributes, random.Random(self.seed))


def draw(attributes: Attributes, rng: random.Random) -> "Image":
    """Draw a scene; all that the attributes leave open is taken from `rng`."""
    from PIL import ImageDraw

    side = IMAGE_SIZE * _OVERSAMPLING
    canvas = _ground(side, rng)
    centre_x, centre_y = (c + rng.uniform(-0.035, 0.035) for c in _CENTRES[attributes.place])
    radius = rng.uniform(*_RADII[attributes.size])
    angle = math.radians(rng.uniform(-14, 14))
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    pen, fill = ImageDraw.Draw(canvas), _fill(attributes.colour, rng)
    for polygon in OUTLINES[attributes.figure]:
        pen.polygon(
            [(side * (centre_x + x * cos - y * sin), side * (centre_y + x * sin + y * cos)) for x, y in polygon],
            fill=fill,
        )
    return canvas.reduce(_OVERSAMPLING)


def _ground(side: int, rng: random.Random) -> "Image":
    """A pale gradient from one colour to another, upright or lying."""
    from PIL import Image

    pale = [_rgb(rng.random(), rng.uniform(0.0, 0.14), rng.uniform(0.84, 0.98)) for _ in range(2)]
    ramp = Image.linear_gradient("L").resize((side, side))
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    return Image.composite(Image.new("RGB", (side, side), pale[0]), Image.new("RGB", (side, side), pale[1]), ramp)


def _fill(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """An exact colour within the range that the word covers."""
    if colour == "black":
        return _rgb(rng.random(), rng.uniform(0.0, 0.3), rng.uniform(0.02, 0.14))
    value = (0.88, 0.98) if colour == "yellow" else (0.6, 0.88)
    return _rgb(rng.uniform(*_HUES[colour]) % 1.0, rng.uniform(0.78, 1.0), rng.uniform(*value))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ellipse(x: float, y: float, width: float, height: float, corners: int = 36) -> "Polygon":
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in turns]


def _star(points: int = 5, inner: float = 0.42) -> "Polygon":
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [(r * math.cos(t), r * math.sin(t)) for t, r in zip(turns, [1.08, inner] * points, strict=True)]


def _heart(corners: int = 40) -> "Polygon":
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


# Polygons of each figure around (0, 0) within a radius of about 1; y grows downwards.
OUTLINES: dict[str, list["Polygon"]] = {
    "circle": [_ellipse(0, 0, 0.95, 0.95)],
    "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "star": [_star()],
    "heart": [_heart()],
    "fish": [_ellipse(-0.25, 0, 0.8, 0.5), [(0.3, 0), (1.05, -0.6), (1.05, 0.6)]],
    "tree": [
        [(0, -1.1), (0.6, -0.2), (-0.6, -0.2)],
        [(0, -0.6), (0.85, 0.55), (-0.85, 0.55)],
        [(-0.15, 0.5), (0.15, 0.5), (0.15, 1.05), (-0.15, 1.05)],
    ],
}
