"""Pathfinder: are two marked ends those of one dashed line? Images drawn by the published algorithm, not the released.

"Learning long-range spatial dependencies with horizontal gated recurrent units", https://arxiv.org/abs/1805.08315,
supplement, with the sizes of "Long Range Arena", https://arxiv.org/abs/2011.04006, section 2.2.5 and 2.2.6. Two dashed
lines (snakes, of paddles) of equal length wind through an image among shorter ones. Both begin near each other; a disk
marks the beginning of one, another the end of the same (label 1) or of the other (label 0).

A snake grows by turns: from the pivot, a gap behind its last paddle, candidates for the next head lie on a circle; one
is drawn with a weight that prefers to go on straight, ``cos(min(continuity * turn, 90 degrees)) ** 2``, and is less the
nearer it is to what was drawn before. A paddle that would cross another is drawn anew, and where none fits, the pair of
snakes is begun anew (a distractor is tried elsewhere). What was drawn, with a margin, is kept as a mask.

All that chance decides is arithmetic of integers on tables that are rounded when they are made, so that an image is the
same on every machine.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.kernels.numba_runtime import threads_for
from seqzoo.train.data import compiled

# contrasts are multiples of a twentieth
CONTRAST = 20
# by how much a drawing is finer than the image
FINE = 2


class Drawing(NamedTuple):
    """The published parameters of a size, in pixels.

    Attributes:
        paddle: Length of a paddle.
        thickness: Of a paddle.
        margins: Room around paddles, one of which each image draws.
        marker: Radius of the disks.
        seed_distance: From the beginning of one target to that of the other.
        continuity: How much a snake goes on straight.
        distractors: Snakes beside the targets, where there is room.
        target_contrast: Brightness of the targets; that of the disks is 1.
        distractor_contrast: Brightness of the others.
        padding: Border that is kept free.
        contour_length: Paddles of a target.
        distractor_length: Paddles of another.
        legacy_seeding: Whether a first paddle is refused where the original program finds no room for want of a value
            beyond the image's border (nine of ten orientations at 32 x 32, so that hardly a distractor is drawn).
    """

    paddle: int
    thickness: float
    margins: tuple[int, ...]
    marker: float
    seed_distance: int
    continuity: float
    distractors: int
    target_contrast: float
    distractor_contrast: float
    padding: int
    contour_length: int = 14
    distractor_length: int = 4
    legacy_seeding: bool = False


SIZES = {
    32: Drawing(2, 0.5, (1,), 1.5, 7, 1.0, 5, 1.5, 2.0, 1),
    64: Drawing(5, 1.0, (1,), 2.5, 12, 1.8, 5, 0.8, 0.8, 1),
    128: Drawing(5, 1.5, (2, 3), 3.0, 20, 1.8, 8, 0.9, 0.9, 1),
    256: Drawing(5, 2.0, (3,), 5.0, 27, 1.8, 7, 1.0, 1.0, 22),
}


class Images(NamedTuple):
    """What was drawn.

    Attributes:
        pixels: uint8 ``(n, size, size)``.
        labels: int64 ``(n,)``, 1 where the marks are at the ends of one snake.
        distractors: int64 ``(n,)``, how many were drawn.
        attempts: int64 ``(n,)``, how often the targets were begun.
        marks: int64 ``(n, 2, 2)``, row and column of both marks.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    distractors: NDArray[np.int64]
    attempts: NDArray[np.int64]
    marks: NDArray[np.int64]


def drawing(size: int, *, contour_length: int = 14, legacy_seeding: bool = False) -> Drawing:
    """The published parameters of a size, with other targets or the original program's choice of places.

    Raises:
        ValueError: If there are none for the size, or the length is not positive.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))}, got {size}")
    if contour_length < 2:
        raise ValueError(f"contour_length must be at least 2, got {contour_length}")
    return SIZES[size]._replace(contour_length=contour_length, legacy_seeding=legacy_seeding)


def draw(seed: int, first: int, count: int, size: int, parameters: Drawing | None = None) -> Images:
    """Draws the images of the indices from ``first`` on, each a pure function of seed, index, size and parameters.

    Args:
        seed: Of all images, from 0 to 2^64 - 1.
        first: The first index.
        count: How many.
        size: Rows, and columns.
        parameters: What is drawn; None means what is published for the size.

    Raises:
        ValueError: If a number is out of range.
    """
    parameters = drawing(size) if parameters is None else parameters
    for name, value, most in (("seed", seed, 2**64), ("first", first, 2**63), ("count", count, 2**31)):
        if not 0 <= value < most:
            raise ValueError(f"{name} must be from 0 to {most - 1}, got {value}")
    band = 2 * parameters.seed_distance
    if size <= 2 * band:
        raise ValueError(f"size must be above 4 * seed_distance = {2 * band}, got {size}")
    images = np.empty((count, size, size), dtype=np.uint8)
    facts = np.empty((count, 7), dtype=np.int64)
    plan = (
        parameters.padding,
        band,
        parameters.contour_length,
        parameters.distractor_length,
        parameters.distractors,
    )
    levels = (parameters.target_contrast, parameters.distractor_contrast, 1.0)
    contrasts = np.array([round(CONTRAST * level) for level in levels], dtype=np.int64)
    # each image is far more work than its pixels
    threads = threads_for(max(count, 1) * 1_000_000) if count > 1 else 1
    start = np.uint64(seed), np.uint64(first)
    compiled._pathfinder(
        threads, *start, np.array(plan, dtype=np.int64), contrasts, *_tables(parameters), images, facts
    )
    if count and facts[:, 2].max() > compiled.ATTEMPTS:
        raise ValueError(f"{compiled.ATTEMPTS} attempts gave no two targets; there is no room for {parameters}")
    return Images(images, facts[:, 0], facts[:, 1], facts[:, 2], facts[:, 3:].reshape(count, 2, 2))


@lru_cache(maxsize=8)
def _tables(parameters: Drawing) -> tuple[NDArray[np.generic], ...]:
    """What the compiled loop looks up, an entry a margin first, the smaller ones padded to the largest."""
    margins = [_margin_tables(parameters, margin) for margin in parameters.margins]
    stacked = []
    for parts in zip(*margins, strict=True):
        room = np.max([part.shape for part in parts], axis=0)
        whole = np.zeros((len(parts), *room), dtype=parts[0].dtype)
        for place, part in enumerate(parts):
            whole[(place, *map(slice, part.shape))] = part
        stacked.append(whole)
    angles = np.radians(np.arange(360))
    around = parameters.seed_distance * np.stack((np.sin(angles), np.cos(angles)), -1)
    return (*stacked, np.floor(around.round(9) + 0.5).astype(np.int64), _disk(parameters.marker))


def _margin_tables(parameters: Drawing, margin: int) -> tuple[NDArray[np.generic], ...]:
    length, radius = parameters.paddle, parameters.paddle + margin
    circle = _circle(radius)
    to_candidates = np.arctan2(circle[:, 0], circle[:, 1])
    degrees = np.radians(np.arange(-180, 180))
    orientations = np.concatenate((degrees, to_candidates))
    # a first paddle is drawn from its tip along its orientation, a later one from its head back to the pivot
    drawn = [_paddle(angle, parameters, margin) for angle in (*degrees, *(to_candidates + math.pi))]
    inks, masks = (np.stack(kind) for kind in zip(*drawn, strict=True))
    half = inks.shape[1] // 2
    heads = _ahead(degrees, length)
    seeds = np.concatenate((heads, heads + _ahead(degrees + math.pi, radius)), -1)
    turns = np.abs(orientations[:, None] - to_candidates)
    turns = np.minimum(turns, 2 * math.pi - turns)
    weights = np.cos(np.minimum(parameters.continuity * turns, math.pi / 2)) ** 2
    # a place is free if the pixels are where the mask is full, one row and column off, as in the original: were it all
    # pixels of the mask, a small image would have no place
    full = [np.argwhere(mask == 255) - half + 1 for mask in masks[:360]]
    cores = np.array([len(places) for places in full])
    core = np.zeros((360, cores.max(), 2), dtype=np.int64)
    for degree, places in enumerate(full):
        core[degree, : len(places)] = places
    allowed = np.array([not parameters.legacy_seeding or _reaches_all_corners(places) for places in full])
    return (
        np.array([half, margin, len(circle)]),
        inks,
        masks,
        seeds,
        _ahead(orientations, length + 2 * margin),
        circle,
        np.round(weights * 65536).astype(np.int64),
        core,
        cores,
        allowed,
    )


def _reaches_all_corners(places: NDArray[np.int64]) -> bool:
    """Whether of these offsets one lies inside the image wherever they are laid."""
    row, column = places.T
    return all(bool(((y * row >= 0) & (x * column >= 0)).any()) for y in (-1, 1) for x in (-1, 1))


def _ahead(angles: NDArray[np.float64], distance: int) -> NDArray[np.int64]:
    """Offsets (row, column) of the pixel at a distance, rounded up; rounded before, as 0 may be 1e-17."""
    steps = distance * np.stack((np.sin(angles), np.cos(angles)), -1)
    return np.ceil(steps.round(9)).astype(np.int64)


def _circle(radius: int) -> NDArray[np.int64]:
    """Offsets of the pixels on a circle, met in steps of one pixel of arc."""
    angles = np.radians(np.arange(0, 360, 360 / (2 * math.pi * radius)))
    points = radius * np.stack((np.sin(angles), np.cos(angles)), -1)
    return np.unique(np.floor(points.round(9)).astype(np.int64), axis=0)


def _paddle(angle: float, parameters: Drawing, margin: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Ink and mask of a paddle whose tip is the middle of a square, uint8."""
    reach = parameters.paddle + math.ceil(parameters.thickness) + margin
    middle = FINE * reach
    end = _ahead(np.array([angle]), FINE * parameters.paddle)[0]
    fine = _line(2 * middle + 1, middle, (int(end[0]), int(end[1])), round(FINE * parameters.thickness))
    mask = _dilated(fine, FINE * margin)
    return _reduced(fine, 2 * reach + 1), _reduced(mask, 2 * reach + 1)


def _line(size: int, middle: int, end: tuple[int, int], width: int) -> NDArray[np.bool_]:
    """A line from the middle by an offset: Bresenham's of one pixel, else a quadrangle whose corners are pixels.

    Of an even width, one pixel more lies to the right and below; a third of a pixel beyond an edge is inside. So it
    comes closest to the lines of the library that drew the released images.
    """
    if width == 1:
        canvas = np.zeros((size, size), dtype=bool)
        count = max(abs(end[0]), abs(end[1]))
        for step in range(count + 1):
            row, column = (math.floor((2 * step * part + count) / (2 * count)) for part in end)
            canvas[middle + row, middle + column] = True
        return canvas
    length = math.hypot(*end)
    less, more = ((width - 1) // 2 / length, width // 2 / length)
    sides = np.array([(more * end[1], -less * end[0]), (-less * end[1], more * end[0])]).round(9)
    one, other = np.copysign(np.floor(np.abs(sides) + 0.5), sides).astype(int).tolist()
    corners = [one, [end[0] + one[0], end[1] + one[1]], [end[0] + other[0], end[1] + other[1]], other]
    row, column = np.mgrid[-middle : size - middle, -middle : size - middle]
    inside = np.ones((size, size), dtype=bool)
    for (top, left), (bottom, right) in itertools.pairwise([*corners, corners[0]]):
        down, across = bottom - top, right - left
        inside &= 3 * (down * (column - left) - across * (row - top)) >= -max(abs(down), abs(across))
    return inside


def _dilated(canvas: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """A drawing with a disk at each of its pixels."""
    size = len(canvas)
    wide = np.pad(canvas, radius)
    found = np.zeros_like(canvas)
    for row in range(-radius, radius + 1):
        for column in range(-radius, radius + 1):
            if row * row + column * column <= radius * radius:
                found |= wide[radius + row : radius + row + size, radius + column : radius + column + size]
    return found


def _disk(radius: float) -> NDArray[np.uint8]:
    """A disk around a pixel's upper left corner, where doubling the resolution puts its middle."""
    reach = math.ceil(radius) + 3
    row, column = np.mgrid[-FINE * reach : FINE * (reach + 1), -FINE * reach : FINE * (reach + 1)]
    return _reduced(row**2 + column**2 <= (FINE * radius) ** 2, 2 * reach + 1)


def _reduced(canvas: NDArray[np.bool_], size: int) -> NDArray[np.uint8]:
    """A drawing at a lower resolution, by Lanczos' filter of three lobes, rows and columns rounded one by one."""
    ratio = len(canvas) / size
    centre = (np.arange(size) + 0.5) * ratio
    distance = (np.arange(len(canvas)) + 0.5 - centre[:, None]) / ratio
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    weights /= weights.sum(1, keepdims=True)

    def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
        # rounded before, so that a half does not depend on the last bit
        return np.floor(values.clip(0, 255).round(6) + 0.5)

    columns = rounded(255.0 * canvas @ weights.T)
    return rounded(weights @ columns).astype(np.uint8)
