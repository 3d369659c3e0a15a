"""The language model's loss against a loop."""

import numpy as np
import pytest
from loss_cases import MASK, NEW, OLD, assert_close, every_reduction, every_reduction_by_loop

from rlhfjax.losses import reductions, supervised


def test_by_default_every_token_weighs_the_same() -> None:
    assert supervised.language_model(NEW, MASK) == pytest.approx(-NEW[MASK].mean(), rel=1e-6)


def test_under_a_mean_of_sequences_every_text_does_and_empty_ones_nothing() -> None:
    means = [row[mask].mean() for row, mask in zip(NEW, MASK, strict=True) if mask.any()]
    loss = supervised.language_model(NEW, MASK, reduce=reductions.sequence_mean)
    assert loss == pytest.approx(-np.mean(means), rel=1e-6)


def test_loss_and_gradient_under_every_reduction() -> None:
    given = every_reduction(
        lambda *x, **options: (supervised.language_model(*x, **options),), NEW, MASK
    )
    ones = np.ones_like(NEW)
    assert_close(given, every_reduction_by_loop(lambda new, _: -new, NEW, OLD, weights=ones))
