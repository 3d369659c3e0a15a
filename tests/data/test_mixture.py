"""A mixture is a function of the position: shares, passes, and going on from anywhere."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from rlhfjax.data import mixture


def first(num: int, sizes: list[int], **options) -> list[tuple[int, int]]:
    return list(islice(mixture.places(sizes, seed=0, **options), num))


@pytest.mark.parametrize(
    "weights", [[0.7, 0.2, 0.1], [1, 1], [5], [1, 2, 3, 4, 5, 6], [0.3, 1e-3], [97, 2, 1, 1, 1, 1]]
)
def test_the_share_of_every_source_is_exact_within_one_record_at_any_time(weights) -> None:
    sources = [source for source, _ in first(1500, [7] * len(weights), weights=weights)]
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    wanted = np.outer(np.arange(1, 1501), np.array(weights) / sum(weights))
    assert np.abs(counts - wanted).max() < 1


def test_by_hand() -> None:
    # 2 of 3 are due at 1.5, 3, 4.5, 6; 1 of 3 at 3, 6.
    assert [source for source, _ in first(6, [4, 4], weights=[2, 1])] == [0, 0, 1, 0, 0, 1]


def test_without_weights_each_pass_over_all_has_every_record_once() -> None:
    sizes = [3, 11, 5]
    every = {(source, index) for source, size in enumerate(sizes) for index in range(size)}
    found = first(3 * 19, sizes)
    for epoch in range(3):
        assert Counter(found[epoch * 19 : (epoch + 1) * 19]) == Counter(every)


def test_every_pass_over_a_source_has_another_order() -> None:
    found = [index for _, index in first(60, [20])]
    passes = [found[:20], found[20:40], found[40:]]
    assert all(sorted(order) == list(range(20)) for order in passes)
    assert len(set(map(tuple, passes))) == 3
    other = [index for _, index in islice(mixture.places([20], seed=1), 20)]
    assert other != passes[0]


@pytest.mark.parametrize("start", [1, 6, 10, 23, 99])
def test_from_any_position_on_comes_what_came_there_the_first_time(start: int) -> None:
    options = {"weights": [0.5, 0.3, 0.2]}
    assert (
        first(30, [4, 9, 2], start=start, **options)
        == first(start + 30, [4, 9, 2], **options)[start:]
    )


def test_the_records_of_a_stream() -> None:
    sources = ["abc", "XY"]
    found = list(islice(mixture.stream(sources, seed=3, weights=[1, 1], start=2), 8))
    places = list(islice(mixture.places([3, 2], seed=3, weights=[1, 1], start=2), 8))
    assert found == [sources[source][index] for source, index in places]
    assert sum(letter.isupper() for letter in found) == 4


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([], []), ([3], [1, 2]), ([3, 0], [1, 1]), ([3, 2], [1, 0]), ([2, 2], [1, -1])],
)
def test_what_is_no_mixture_is_refused(sizes, weights) -> None:
    with pytest.raises(ValueError, match="needs sources with records, and a positive weight"):
        mixture.places(sizes, weights=weights, seed=0)
