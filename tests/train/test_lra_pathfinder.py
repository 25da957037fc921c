"""The images of Pathfinder: the published statistics, what a label means, and that nothing simpler gives it away."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch

from seqzoo.train.data import pathfinder
from seqzoo.train.data.pathfinder import SIZES, draw, drawing


@pytest.fixture(scope="module")
def images() -> pathfinder.Images:
    return draw(0, 0, 1200, 32)


def statistics(pixels: np.ndarray) -> tuple[float, float, float]:
    values = pixels / 255
    return float(values.mean()), float(values.std()), float((pixels == 0).mean())


def test_statistics_of_the_original_program():
    """Against figures measured on 400 images of the program that drew the released ones."""
    found = draw(0, 0, 1200, 32, drawing(32, legacy_seeding=True))
    assert statistics(found.pixels) == pytest.approx((0.0794, 0.2008, 0.658), abs=0.006)
    edges = [0, 1, 32, 64, 96, 128, 160, 192, 224, 255, 256]
    share = np.histogram(found.pixels, edges)[0] / found.pixels.size
    expected = [0.658, 0.196, 0.019, 0.020, 0.021, 0.040, 0.027, 0.013, 0.005, 0.002]
    np.testing.assert_allclose(share, expected, atol=0.006)
    assert found.distractors.mean() == pytest.approx(1.2, abs=0.12)


def test_statistics_of_the_intended_rule(images):
    assert statistics(images.pixels) == pytest.approx((0.110, 0.227, 0.54), abs=0.01)
    assert images.distractors.mean() > 4.5


def test_statistics_of_path_x():
    found = draw(0, 0, 16, 128)
    assert statistics(found.pixels) == pytest.approx((0.0311, 0.140, 0.8625), abs=0.006)
    assert found.distractors.mean() > 7


@pytest.mark.parametrize("size", SIZES)
def test_every_size_fills_its_range(size):
    found = draw(1, 0, 2, size, drawing(size, contour_length=6))
    assert found.pixels.shape == (2, size, size)
    assert all((one.min(), one.max()) == (0, 255) for one in found.pixels)


def test_images_are_the_same_for_ever():
    found = draw(0, 0, 64, 32)
    parts = (found.pixels, found.labels, found.distractors, found.marks)
    assert hashlib.blake2b(b"".join(part.tobytes() for part in parts)).hexdigest()[:16] == "5593059cde3e6d54"


@pytest.mark.parametrize(
    ("size", "digest"), [(64, "e5e661d12d52e952"), (128, "6eb26958d470e99c"), (256, "2c6869def59c54dc")]
)
def test_larger_images_are_the_same_for_ever(size, digest):
    """Of Path-X, whose margins are drawn, as many as have both."""
    found = draw(0, 0, 6, size, drawing(size, contour_length=6))
    assert hashlib.blake2b(found.pixels.tobytes() + found.marks.tobytes()).hexdigest()[:16] == digest


def test_an_image_depends_on_seed_and_index_alone(images):
    later = draw(0, 700, 3, 32)
    assert np.array_equal(later.pixels, images.pixels[700:703])
    assert np.array_equal(later.labels, images.labels[700:703])
    for seed, first in ((1, 700), (700, 0), (0, 701), (2**32, 700)):
        assert not np.array_equal(draw(seed, first, 1, 32).pixels[0], images.pixels[700])


@pytest.mark.slow
def test_threads_draw_the_same(images):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = draw(0, 0, 100, 32)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(found, images, strict=True):
        assert np.array_equal(one, other[:100])


def test_no_image_comes_twice(images):
    assert len({one.tobytes() for one in images.pixels}) == 1200


def test_labels_say_whether_the_marks_are_of_one_snake():
    """In images without distractors and gaps too small to see, the marks of one snake are connected, others less so."""
    parameters = drawing(64)._replace(distractors=0, contour_length=8)
    found = draw(3, 0, 60, 64, parameters)
    connected = np.array([reachable(*one) for one in zip(found.pixels, found.marks, strict=True)])
    assert connected[found.labels == 1].mean() > 0.95
    assert connected[found.labels == 0].mean() < 0.6


def reachable(pixels: np.ndarray, marks: np.ndarray) -> bool:
    """Whether one mark is reached from the other over what is drawn, widened by the gaps of two pixels."""
    ink = np.pad(pixels > 60, 2)
    size = len(pixels)
    wide = np.zeros((size, size), dtype=bool)
    for row in range(1, 4):
        for column in range(1, 4):
            wide |= ink[row : row + size, column : column + size]
    seen, pending = set(), [tuple(marks[0].tolist())]
    while pending:
        row, column = pending.pop()
        if (row, column) in seen or not (0 <= row < size and 0 <= column < size and wide[row, column]):
            continue
        seen.add((row, column))
        pending += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return tuple(marks[1].tolist()) in seen


def test_marks_are_drawn_where_they_are_said_to_be(images):
    rows, columns = images.marks[..., 0], images.marks[..., 1]
    shown = images.pixels[np.arange(1200)[:, None], rows, columns]
    # the disks have a contrast of 1, distractors of 2
    assert (shown >= 127).all()


def test_nothing_simpler_gives_the_label_away(images):
    """Neither the distance of the marks nor a linear model of the pixels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    assert abs(images.labels.mean() - 0.5) < 4 * 0.5 / 1200**0.5
    distance = np.hypot(*(images.marks[:, 0] - images.marks[:, 1]).T)
    assert 0.4 < roc_auc_score(images.labels, distance) < 0.6
    flat = images.pixels.reshape(1200, -1) / 255
    model = LogisticRegression(C=0.01, max_iter=200).fit(flat[:900], images.labels[:900])
    assert model.score(flat[900:], images.labels[900:]) < 0.5 + 4 * 0.5 / 300**0.5


def test_a_hundred_images_take_less_than_a_second():
    draw(0, 0, 2, 32)
    before = time.process_time()
    draw(0, 0, 200, 32)
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drawing(48), "size must be one of 32, 64, 128, 256, got 48"),
        (lambda: drawing(32, contour_length=1), "contour_length must be at least 2, got 1"),
        (lambda: draw(-1, 0, 1, 32), "seed must be from 0 to 18446744073709551615, got -1"),
        (lambda: draw(0, -1, 1, 32), "first must be from 0"),
        (lambda: draw(0, 0, 1, 28, drawing(32)), "size must be above 4 . seed_distance = 28, got 28"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
