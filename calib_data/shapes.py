"""The world of `shapes-unet`: its captions, a renderer that knows the true picture, and a checker that measures one.

A caption names one object and its place, or two objects and how the first lies to the second:
"a large red circle at the top", "a small blue square above a large white triangle".
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engines.errors import UserError, unknown

SIZE = 32  # pixels to a side
# Redder to the right, bluer downward. Flat ground tells a convolution nothing of where it is; this one has to be drawn
# too, and then shows the place.
_RAMP = np.linspace(-0.95, -0.35, SIZE)
BACKGROUND = np.stack(np.broadcast_arrays(_RAMP[None, :], -0.9, _RAMP[:, None]))  # [3, 32, 32]
COLOURS = {
    "red": (0.75, -0.7, -0.7),
    "green": (-0.7, 0.5, -0.6),
    "blue": (-0.6, -0.4, 0.8),
    "yellow": (0.8, 0.65, -0.6),
    "purple": (0.45, -0.55, 0.6),
    "white": (0.85, 0.85, 0.85),
}  # in [−1, 1]
AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of a shape whose half extent is 1
SIZES = {"small": (3.0, 4.0), "large": (5.5, 7.0)}  # half the extent, in pixels
PLACES = {
    "top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0), "center": (0, 0),
}  # fmt: skip  # (x, y) thirds of the picture; y grows downward
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
GAP = 2.0  # pixels between two objects
SIZE_LIMIT = 4.75  # half extents below are small: the middle between the two ranges
CENTER_LIMIT = 4.0  # offsets below lie in the middle third: rendered ones are under 2.0 or above 6.0
LEAST_PIXELS = 8  # components smaller than this are specks, not objects; the smallest object has 18


@dataclass(frozen=True)
class Object:
    """What a caption says of one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """One object and a place, or two and a relation; `str` gives the sentence."""

    objects: tuple[Object, ...]
    place: str  # a key of PLACES, or of RELATIONS

    def __str__(self) -> str:
        if len(self.objects) == 1:
            return f"{self.objects[0]} {'in' if self.place == 'center' else 'at'} the {self.place}"
        return f"{self.objects[0]} {self.place} {self.objects[1]}"

    @property
    def held_out(self) -> bool:
        """Whether training never sees this caption: a fifth of all, by a hash of the sentence."""
        return hashlib.sha256(str(self).encode()).digest()[0] % 5 == 0


def objects() -> list[Object]:
    return [Object(*words) for words in itertools.product(SIZES, COLOURS, AREAS)]


def captions(count: int) -> list[Caption]:
    """Returns every caption with `count` objects, 180 with one and 5,184 with two."""
    if count == 1:
        return [Caption((one,), place) for one in objects() for place in PLACES]
    return [Caption(pair, place) for pair in itertools.product(objects(), repeat=2) for place in RELATIONS]


def words() -> list[str]:
    """Returns every word of the captions."""
    sentences = (str(caption) for count in (1, 2) for caption in captions(count))
    return sorted({word for sentence in sentences for word in sentence.split()})


def parse(sentence: str) -> Caption:
    """Returns the caption a sentence is, or raises a UserError that names the first word it cannot be."""
    known = _sentences()
    plain = " ".join(sentence.split())
    if plain not in known:
        for word in plain.split():
            if word not in words():
                raise unknown("word", word, words(), f"caption {sentence!r}")
        raise UserError(
            f"caption {sentence!r}: is not a sentence of this model's",
            fix='write e.g. "a large red circle at the top" or "a small blue square above a large red circle"',
        )
    return known[plain]


@cache
def _sentences() -> dict[str, Caption]:
    return {str(caption): caption for count in (1, 2) for caption in captions(count)}


def render(caption: Caption, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws the caption, [3, 32, 32] in [−1, 1]; sizes and places vary as the caption leaves open."""
    image = BACKGROUND.copy()
    for one, (x, y, half) in zip(caption.objects, _layout(caption, rng), strict=True):
        cover = coverage(one.shape, x, y, half)
        colour = np.array(COLOURS[one.colour])[:, None, None]
        image += cover * (colour - image)
    return image.astype(np.float32)


def coverage(shape: str, x: float, y: float, half: float) -> NDArray[np.float64]:
    """Returns the share of every pixel that the shape covers, [32, 32], from its signed distance."""
    centers = np.arange(SIZE) + 0.5
    dx, dy = centers[None, :] - x, centers[:, None] - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - half
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - half
    else:  # its apex above, base and height 2 · half
        distance = np.maximum(dy - half, (2 * np.abs(dx) - (dy + half)) / np.sqrt(5))
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0))


def _layout(caption: Caption, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    halves = [rng.uniform(*SIZES[one.size]) for one in caption.objects]
    middle = SIZE / 2
    if len(halves) == 1:
        (half,) = halves
        at = [_third(third, half, rng) for third in PLACES[caption.place]]
        return [(at[0], at[1], half)]
    axis = 0 if RELATIONS[caption.place][0] else 1
    first, second = (0, 1) if sum(RELATIONS[caption.place]) < 0 else (1, 0)
    spare = SIZE - 2 - GAP - 2 * sum(halves)
    before, between = np.sort(rng.uniform(0, spare, 2))
    along = [0.0, 0.0]
    along[first] = 1 + before + halves[first]
    along[second] = 1 + between + 2 * halves[first] + GAP + halves[second]
    distance = abs(along[0] - along[1])
    shift = rng.uniform(-0.5, 0.5) * distance  # across: well under the distance along, so that the relation is clear
    across = [middle + shift / 2, middle - shift / 2]
    return [(a, c, h) if axis == 0 else (c, a, h) for a, c, h in zip(along, across, halves, strict=True)]


def _third(third: int, half: float, rng: np.random.Generator) -> float:
    if third == 0:
        return SIZE / 2 + rng.uniform(-2.0, 2.0)
    return SIZE / 2 + third * rng.uniform(6.0, SIZE / 2 - 1 - half)


@dataclass(frozen=True)
class Found:
    """An object measured in a picture: position and half extent in pixels."""

    colour: str
    shape: str
    half: float
    x: float
    y: float

    @property
    def size(self) -> str:
        return "small" if self.half < SIZE_LIMIT else "large"


def measure(image: NDArray[np.float32]) -> list[Found]:
    """Finds the objects of a picture [3, 32, 32], largest first, by geometry alone: no network judges here.

    Every pixel is a mixture of background and its nearest colour; the objects are connected pixels of one colour.
    """
    directions = np.array(list(COLOURS.values()))[:, :, None, None] - BACKGROUND  # [colours, 3, 32, 32]
    squares = np.square(directions).sum(axis=1)
    offset = np.where(np.isfinite(image), image, BACKGROUND).astype(np.float64) - BACKGROUND
    shares = (offset * directions).sum(axis=1) / squares  # of each colour, were it the pixel's
    misses = np.square(offset - shares[:, None] * directions).sum(axis=1)
    nearest = misses.argmin(axis=0)
    share = np.take_along_axis(shares, nearest[None], axis=0)[0].clip(0, 1)
    found: list[tuple[int, Found]] = []
    for index, colour in enumerate(COLOURS):
        solid, count = ndimage.label((nearest == index) & (share > 0.5), structure=np.ones((3, 3)))
        for number in range(1, count + 1):
            pixels = int((solid == number).sum())
            if pixels >= LEAST_PIXELS:
                found.append((pixels, _found(colour, np.where(_with_edge(solid == number), share, 0.0))))
    found.sort(key=lambda entry: -entry[0])
    return [one for _, one in found]


def _with_edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(ndimage.binary_dilation(mask, structure=np.ones((3, 3))))


def _found(colour: str, cover: NDArray[np.float64]) -> Found:
    """Fits each shape by area and centre of mass, and takes the one whose rendering lies nearest."""
    area = cover.sum()
    centers = np.arange(SIZE) + 0.5
    x, y = float(cover.sum(axis=0) @ centers / area), float(cover.sum(axis=1) @ centers / area)
    fits = []
    for shape, factor in AREAS.items():
        half = float(np.sqrt(area / factor))
        middle = y - half / 3 if shape == "triangle" else y  # its centre of mass lies at a third of its height
        error = float(np.square(coverage(shape, x, middle, half) - cover).sum())
        fits.append((error, Found(colour, shape, half, x, middle)))
    return min(fits, key=lambda fit: fit[0])[1]


def attributes(caption: Caption, found: Sequence[Found]) -> dict[str, list[bool]]:
    """Says which attributes of a caption a picture has right: shape, colour, size per object, and position once.

    Of the objects found, as many of the largest as were asked are matched with those asked, as favours the picture
    most; what is missing is wrong.
    """
    most: dict[str, list[bool]] = {}
    for order in itertools.permutations(
        [*found[: len(caption.objects)], *[None] * len(caption.objects)], len(caption.objects)
    ):
        right = {
            key: [
                one is not None and getattr(one, key) == getattr(asked, key)
                for asked, one in zip(caption.objects, order, strict=True)
            ]
            for key in ("shape", "colour", "size")
        } | {"position": [_placed(caption.place, order)]}
        if not most or sum(map(sum, right.values())) > sum(map(sum, most.values())):
            most = right
    return most


def _placed(place: str, found: Sequence[Found | None]) -> bool:
    if len(found) == 1:
        (one,) = found
        return one is not None and PLACES[place] == (_thirds(one.x), _thirds(one.y))
    first, second = found
    if first is None or second is None:
        return False
    dx, dy = first.x - second.x, first.y - second.y
    return RELATIONS[place] == ((int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy))))


def _thirds(position: float) -> int:
    offset = position - SIZE / 2
    return 0 if abs(offset) < CENTER_LIMIT else int(np.sign(offset))


def accuracy(caption: Caption, image: NDArray[np.float32]) -> float:
    """Returns the share of a caption's attributes that a picture [3, 32, 32] shows."""
    right = [value for values in attributes(caption, measure(image)).values() for value in values]
    return sum(right) / len(right)


def draw(rng: np.random.Generator, *, held_out: bool) -> Iterator[Caption]:
    """Yields captions of one side of the split, one object as often as two."""
    pools = [[c for c in captions(count) if c.held_out == held_out] for count in (1, 2)]
    while True:
        pool = pools[int(rng.integers(2))]
        yield pool[int(rng.integers(len(pool)))]
