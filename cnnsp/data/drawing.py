"""Synthetic flowers: three classes told apart by their petals, drawn without any photograph.

A daisy has many slim petals around a disc, a dandelion is a ball of very many thin florets, a rose
has few broad petals that overlap and spiral inwards. Any class may have any colour, size, place,
tilt, light and background, so a network has to look at the petals.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import pi

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from .. import IMAGE_SIZE

CLASSES = ("daisy", "dandelion", "rose")

Colour = tuple[int, int, int]

# Drawn at twice the size, then averaged down: ImageDraw has no antialiasing of its own.
_SUPERSAMPLE = 2

_PETAL_COLOURS = np.array(
    [
        (244, 242, 236),  # white
        (248, 208, 52),  # yellow
        (240, 150, 178),  # pink
        (198, 36, 52),  # red
        (240, 130, 60),  # orange
        (160, 110, 200),  # violet
    ]
)
# A class prefers the colour of its name in nature, but less than half of the time.
_FAVOURITE = {"daisy": (0,), "dandelion": (1,), "rose": (2, 3)}
_FAVOURED = 0.3

_GROUNDS = np.array(
    [(58, 92, 44), (96, 128, 66), (40, 60, 40), (112, 94, 70), (150, 176, 200), (120, 124, 118)]
)
_LEAVES = np.array([(70, 118, 52), (104, 148, 70), (44, 84, 48), (134, 150, 84), (120, 100, 62)])


def draw(seed: int, split: int, label: int, number: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """A picture that depends on these numbers only: uint8 ``[size, size, 3]``, RGB."""
    rng, kind = np.random.default_rng([seed, split, label, number]), CLASSES[label]
    canvas = size * _SUPERSAMPLE
    image = _background(rng, canvas)
    draw = ImageDraw.Draw(image)
    _clutter(draw, rng, canvas, count=int(rng.integers(3, 16)))
    if rng.random() < 0.35:
        out_of_focus = image.reduce(int(rng.integers(4, 13)))
        image = out_of_focus.resize(image.size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
    flower = _Flower(draw, rng, canvas, kind)
    flower.stem()
    {"daisy": flower.daisy, "dandelion": flower.dandelion, "rose": flower.rose}[kind]()
    _clutter(draw, rng, canvas, count=int(rng.integers(0, 2)))  # what hangs before the flower
    image = image.reduce(_SUPERSAMPLE)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2)))
    return _light(np.asarray(image), rng)


def _background(rng: Generator, canvas: int) -> Image.Image:
    # A few colours at random, enlarged smoothly: patches of ground, foliage or sky.
    cells = int(rng.integers(2, 6))
    base = _GROUNDS[rng.integers(len(_GROUNDS))] * rng.uniform(0.6, 1.3)
    patches = base + rng.normal(0, rng.uniform(5, 35), (cells, cells, 1))
    patches = patches + rng.normal(0, 10, (cells, cells, 3))
    small = Image.fromarray(patches.clip(0, 255).astype(np.uint8))
    return small.resize((canvas, canvas), Image.Resampling.BICUBIC)


def _clutter(draw: ImageDraw.ImageDraw, rng: Generator, canvas: int, count: int) -> None:
    """Blades of grass, leaves, and blobs in the colours of petals."""
    for _ in range(count):
        where = rng.uniform(0, canvas, 2)
        angle = rng.uniform(0, 2 * pi)
        what = rng.random()
        if what < 0.5:
            length, width = rng.uniform(0.2, 0.7) * canvas, rng.uniform(0.005, 0.02) * canvas
            outline = _petal(0, length, width, 0.5, 8)
            colour = _shade(_LEAVES[rng.integers(len(_LEAVES))], rng.uniform(0.6, 1.3))
        elif what < 0.85:
            length = rng.uniform(0.08, 0.3) * canvas
            outline = _petal(0, length, length * rng.uniform(0.12, 0.3), 0.9, 14)
            colour = _shade(_LEAVES[rng.integers(len(_LEAVES))], rng.uniform(0.6, 1.3))
        else:
            radius = rng.uniform(0.01, 0.06) * canvas
            outline = _circle(radius) * (1, rng.uniform(0.5, 1))
            colour = _shade(_PETAL_COLOURS[rng.integers(len(_PETAL_COLOURS))], rng.uniform(0.5, 1))
        points = outline @ _rotation(angle) + where
        draw.polygon(points.ravel().tolist(), fill=colour)


def _light(pixels: np.ndarray, rng: Generator) -> np.ndarray:
    """Uneven light, a colour cast, contrast and sensor noise."""
    size = pixels.shape[0]
    angle, strength = rng.uniform(0, 2 * pi), rng.uniform(0, 0.5)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    light = (rng.uniform(0.7, 1.25) * (1 + strength / 2 * slope[..., None])).astype(np.float32)
    cast = rng.uniform(0.88, 1.12, 3).astype(np.float32)
    contrast = rng.uniform(0.7, 1.2)
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * rng.uniform(2, 12)
    lit = (pixels.astype(np.float32) - 110) * contrast + 110
    return (lit * light * cast + grain).clip(0, 255).astype(np.uint8)


class _Flower:
    """One flower on the canvas; its shapes are given relative to a unit circle."""

    def __init__(self, draw: ImageDraw.ImageDraw, rng: Generator, canvas: int, kind: str) -> None:
        self.draw, self.rng, self.canvas = draw, rng, canvas
        self.centre = rng.uniform(0.42, 0.58, 2) * canvas
        radius = rng.uniform(0.3, 0.44) * canvas
        # From the unit circle to the canvas: turned, then seen at a tilt from some side.
        tilt, side = rng.uniform(0.85, 1), rng.uniform(0, pi)
        self.plane = _rotation(rng.uniform(0, 2 * pi)) * (1, tilt) @ _rotation(side) * radius
        favoured = rng.random() < _FAVOURED
        choice = _FAVOURITE[kind] if favoured else range(len(_PETAL_COLOURS))
        tint = rng.normal(0, 10, 3)
        self.colour = _PETAL_COLOURS[choice[rng.integers(len(choice))]] + tint

    def _fill(
        self, outline: np.ndarray, colour: Colour, angle: float = 0, edge: Colour | None = None
    ) -> None:
        """Fill a polygon ``[K, 2]`` of the unit circle's plane, turned by ``angle``."""
        points = outline @ (_rotation(angle) @ self.plane) + self.centre
        self.draw.polygon(points.ravel().tolist(), fill=colour, outline=edge)

    def _tone(self, low: float, high: float) -> Colour:
        return _shade(self.colour, self.rng.uniform(low, high))

    def stem(self) -> None:
        angle = self.rng.uniform(0.2, 0.8) * pi  # downwards
        width = self.rng.uniform(0.008, 0.02) * self.canvas
        end = self.centre + 1.5 * self.canvas * np.array([np.cos(angle), np.sin(angle)])
        colour = _shade(_LEAVES[self.rng.integers(3)], self.rng.uniform(0.6, 1.1))
        self.draw.line([*self.centre, *end], fill=colour, width=int(width) + 1)

    def daisy(self) -> None:
        rng = self.rng
        disc = rng.uniform(0.2, 0.34)
        petals = int(rng.integers(11, 22))
        width = rng.uniform(0.85, 1.2) * 1.7 / petals
        for layer, light in ((0, 0.78), (1, 1.0)):
            for number in range(petals):
                angle = (number + layer / 2 + rng.normal(0, 0.1)) * 2 * pi / petals
                outline = _petal(disc * 0.6, rng.uniform(0.85, 1), width, 1.5, 12)
                tone = self._tone(0.92 * light, 1.04 * light)
                self._fill(outline, tone, angle, edge=_shade(tone, 0.8))
        heart = np.array(((226, 170, 30), (150, 96, 40), (110, 130, 50))[rng.integers(3)])
        self._fill(_circle(disc), _shade(heart, 0.85))
        for _ in range(60):
            distance = disc * 0.93 * rng.random() ** 0.5
            dot = _circle(disc * 0.1, 6) + np.array([distance, 0])
            self._fill(dot, _shade(heart, rng.uniform(0.7, 1.35)), rng.uniform(0, 2 * pi))

    def dandelion(self) -> None:
        rng = self.rng
        self._fill(_circle(0.6), self._tone(0.6, 0.7))
        florets = int(rng.integers(220, 320))
        width = rng.uniform(0.012, 0.022)
        for number in range(florets):
            # The outer florets lie below, the inner ones are shorter and lighter.
            inner = number / florets
            tip = (1 - 0.75 * inner) * rng.uniform(0.92, 1.02)
            outline = _petal(max(0.0, tip - 0.5), tip, width * rng.uniform(0.8, 1.3), 2.5, 6)
            angle = rng.uniform(0, 2 * pi)
            self._fill(outline, self._tone(0.68 + 0.2 * inner, 1.0 + 0.15 * inner), angle)

    def rose(self) -> None:
        rng = self.rng
        angle = 0.0
        rings = int(rng.integers(4, 6))
        for ring in range(rings):
            tip = 1 - 0.8 * ring / rings
            petals = 5 if ring < 2 else 3
            for _ in range(petals):
                angle += 2 * pi / petals * rng.uniform(0.9, 1.1)
                outline = _petal(0, tip * rng.uniform(0.92, 1.04), tip * 0.52, 1.3, 20)
                tone = self._tone(0.85 - 0.08 * ring, 1.05 - 0.08 * ring)
                # A rolled edge: a lighter rim beyond a darker petal.
                self._fill(outline, _shade(tone, 1.12), angle, edge=_shade(tone, 0.6))
                self._fill(0.93 * outline, tone, angle)
            angle += 2.4  # the golden angle, so that rings do not line up
        turns = np.linspace(0, 4.5 * pi, 40)
        spiral = np.stack([np.cos(turns), np.sin(turns)], 1) * (0.02 + 0.011 * turns[:, None])
        for start, end in pairwise(spiral):
            side = (end - start)[::-1] * (1, -1) * 0.18
            corners = np.stack([start - side, start + side, end + side, end - side])
            self._fill(corners, _shade(self.colour, 0.5))


def _petal(base: float, tip: float, half_width: float, bluntness: float, points: int) -> np.ndarray:
    """Outline of a petal along the x axis from ``base`` to ``tip``: ``[2 * points, 2]``.

    The larger ``bluntness``, the nearer to the tip is it widest.
    """
    return _unit_petal(bluntness, points) * (tip - base, half_width) + (base, 0)


@cache
def _unit_petal(bluntness: float, points: int) -> np.ndarray:
    along = np.linspace(0, 1, points)
    half = np.sqrt(np.sin(pi * along**bluntness).clip(0))
    return np.concatenate([np.stack([along, half], 1), np.stack([along, -half], 1)[::-1]])


def _circle(radius: float, points: int = 28) -> np.ndarray:
    return radius * _unit_circle(points)


@cache
def _unit_circle(points: int) -> np.ndarray:
    angle = np.linspace(0, 2 * pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _rotation(angle: float) -> np.ndarray:
    """The matrix that turns row vectors by ``angle``."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _shade(colour: Sequence[float] | np.ndarray, light: float) -> Colour:
    red, green, blue = (int(min(max(value * light, 0), 255)) for value in colour)
    return red, green, blue
