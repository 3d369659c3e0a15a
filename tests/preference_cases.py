"""Arrays for the losses of preferences, and each loss as a loop in float64."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import anchored, preference, reference_free, unpaired

RNG = np.random.default_rng(0)
GROUPS, B = 2, 6
REF_CHOSEN, REF_REJECTED = RNG.uniform(-9.0, -3.0, (2, GROUPS, B)).astype(np.float32)
CHOSEN = (REF_CHOSEN + RNG.normal(0.3, 1.0, (GROUPS, B))).astype(np.float32)
REJECTED = (REF_REJECTED + RNG.normal(0.0, 1.0, (GROUPS, B))).astype(np.float32)
MEANS = tuple(RNG.uniform(-2.0, -0.2, (2, GROUPS, B)).astype(np.float32))
MASK = np.array([[1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], bool)
WEIGHTS = RNG.uniform(0.5, 2.0, (GROUPS, B)).astype(np.float32)
DESIRABLE = np.array([1, 1, 0, 1, 0, 0], bool)

PAIRS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
SINGLES = (CHOSEN, REF_CHOSEN)
BETA = 0.5
KL = 0.7


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + np.exp(-x))


def cross_entropy(margin: float, smoothing: float = 0.0) -> float:
    win = sigmoid(margin)
    return -(1 - smoothing) * np.log(win) - smoothing * np.log(1 - win)


def log_odds(log_prob: float) -> float:
    return np.log(np.exp(log_prob) / (1 - np.exp(log_prob)))


def of_margins(equation: Callable[[float], float]) -> Callable[..., list[float]]:
    """A loss of m = β·((c - c_ref) - (r - r_ref))."""
    return of_rewards(lambda chosen, rejected: equation(chosen - rejected))


def of_rewards(equation: Callable[[float, float], float]) -> Callable[..., list[float]]:
    def loop(*arrays: np.ndarray) -> list[float]:
        return [
            equation(BETA * (c - c_ref), BETA * (r - r_ref))
            for c, r, c_ref, r_ref in zip(*arrays, strict=True)
        ]

    return loop


def of_log_probs(equation: Callable[[float, float], float]) -> Callable[..., list[float]]:
    return lambda *arrays: [equation(c, r) for c, r in zip(*arrays, strict=True)]


def exo_by_pair(margin: float) -> float:
    win = sigmoid(margin)
    return win * np.log(win / 0.8) + (1 - win) * np.log((1 - win) / 0.2)


def discopop_by_pair(margin: float) -> float:
    gate = sigmoid(margin / 0.3)
    return (1 - gate) * cross_entropy(margin) + gate * np.exp(-margin)


def robust_by_pair(margin: float) -> float:
    return (0.8 * cross_entropy(margin) - 0.2 * cross_entropy(-margin)) / 0.6


def f_dpo_by_pair(derivative: Callable[[float], float]) -> Callable[..., list[float]]:
    return of_rewards(
        lambda c, r: cross_entropy(
            BETA * (derivative(np.exp(c / BETA)) - derivative(np.exp(r / BETA)))
        )
    )


def aot_by_loop(*arrays: np.ndarray) -> list[float]:
    chosen, rejected, ref_chosen, ref_rejected = arrays
    matched = np.empty(len(chosen))
    matched[np.argsort(chosen - rejected)] = np.sort(ref_chosen - ref_rejected)
    margins = BETA * (chosen - rejected - matched)
    return [cross_entropy(margin, 0.1) for margin in margins]


def aot_unpaired_by_loop(*arrays: np.ndarray) -> list[float]:
    chosen, rejected = arrays[0] - arrays[2], arrays[1] - arrays[3]
    matched = np.empty(len(chosen))
    matched[np.argsort(chosen)] = np.sort(rejected)
    return [cross_entropy(BETA * (c - r), 0.1) for c, r in zip(chosen, matched, strict=True)]


def kto_pair_by_loop(*arrays: np.ndarray) -> list[float]:
    chosen, rejected = arrays[0] - arrays[2], arrays[1] - arrays[3]
    chosen_kl, rejected_kl = max(chosen.mean(), 0.0), max(rejected.mean(), 0.0)
    return [
        (1 - sigmoid(BETA * (c - rejected_kl))) / 2 + (1 - sigmoid(BETA * (chosen_kl - r))) / 2
        for c, r in zip(chosen, rejected, strict=True)
    ]


def kto(log_probs: Any, ref_log_probs: Any, *mask: Any, **options: Any) -> Any:
    return unpaired.kto(log_probs, ref_log_probs, like(log_probs), KL, *mask, **options)


def bco(log_probs: Any, ref_log_probs: Any, *mask: Any, **options: Any) -> Any:
    return unpaired.bco(log_probs, ref_log_probs, like(log_probs), 0.2, *mask, **options)


def like(log_probs: Any) -> jax.Array:
    return jnp.broadcast_to(DESIRABLE[: log_probs.shape[-1]], log_probs.shape)


class Case(NamedTuple):
    loss: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    by_loop: Callable[..., list[float]]
    num_trained: int = 2


def paired(loss: Callable[..., Any], by_loop: Callable[..., list[float]], **options: Any) -> Case:
    return Case(functools.partial(loss, beta=BETA, **options), PAIRS, by_loop)


LOSSES: dict[str, Case] = {
    "dpo": paired(preference.dpo, of_margins(cross_entropy)),
    "cdpo": paired(
        preference.cdpo, of_margins(lambda m: cross_entropy(m, 0.2)), label_smoothing=0.2
    ),
    "robust": paired(preference.robust, of_margins(robust_by_pair), label_smoothing=0.2),
    "hinge": paired(preference.hinge, of_margins(lambda m: max(0.0, 1 - m))),
    "ipo": paired(preference.ipo, of_margins(lambda m: (m / BETA - 1 / (2 * BETA)) ** 2)),
    "exo": paired(preference.exo, of_margins(exo_by_pair), label_smoothing=0.2),
    "discopop": paired(preference.discopop, of_margins(discopop_by_pair), temperature=0.3),
    "aot": paired(preference.aot, aot_by_loop, label_smoothing=0.1),
    "aot unpaired": paired(preference.aot_unpaired, aot_unpaired_by_loop, label_smoothing=0.1),
    "forward KL": paired(
        preference.f_dpo,
        f_dpo_by_pair(lambda u: -1 / u),
        derivative=functools.partial(preference.alpha_derivative, alpha=0.0),
    ),
    "reverse KL": paired(
        preference.f_dpo,
        f_dpo_by_pair(np.log),
        derivative=functools.partial(preference.alpha_derivative, alpha=1.0),
    ),
    "alpha divergence": paired(
        preference.f_dpo,
        f_dpo_by_pair(lambda u: u**-0.5 / -0.5),
        derivative=functools.partial(preference.alpha_derivative, alpha=0.5),
    ),
    "Jensen-Shannon": paired(
        preference.f_dpo,
        f_dpo_by_pair(lambda u: np.log(2 * u / (1 + u))),
        derivative=preference.js_derivative,
    ),
    "sppo": paired(
        anchored.sppo, of_rewards(lambda c, r: (c / BETA - 1.0) ** 2 + (r / BETA + 1.0) ** 2)
    ),
    "nca": paired(
        anchored.nca,
        of_rewards(
            lambda c, r: -np.log(sigmoid(c)) - 0.5 * np.log(sigmoid(-c)) - 0.5 * np.log(sigmoid(-r))
        ),
    ),
    "apo zero": paired(anchored.apo_zero, of_rewards(lambda c, r: 1 - sigmoid(c) + sigmoid(r))),
    "apo down": paired(anchored.apo_down, of_rewards(lambda c, r: sigmoid(c) + 1 - sigmoid(c - r))),
    "bco pair": paired(
        anchored.bco_pair, of_rewards(lambda c, r: cross_entropy(c) + cross_entropy(-r))
    ),
    "kto pair": paired(anchored.kto_pair, kto_pair_by_loop),
    "simpo": Case(
        functools.partial(reference_free.simpo, beta=2.0, margin=0.6, label_smoothing=0.1),
        MEANS,
        of_log_probs(lambda c, r: cross_entropy(2.0 * (c - r) - 0.6, 0.1)),
    ),
    "cpo": Case(
        functools.partial(reference_free.cpo, beta=BETA, label_smoothing=0.1),
        MEANS,
        of_log_probs(lambda c, r: cross_entropy(BETA * (c - r), 0.1)),
    ),
    "orpo": Case(
        functools.partial(reference_free.orpo, beta=0.3, label_smoothing=0.1),
        MEANS,
        of_log_probs(lambda c, r: 0.3 * cross_entropy(log_odds(c) - log_odds(r), 0.1)),
    ),
    "slic": Case(
        functools.partial(reference_free.slic, margin=0.7),
        MEANS,
        of_log_probs(lambda c, r: max(0.0, 0.7 - c + r)),
    ),
    "kto": Case(
        functools.partial(kto, beta=BETA, desirable_weight=1.2, undesirable_weight=0.8),
        SINGLES,
        lambda *arrays: [
            1.2 * (1 - sigmoid(r - BETA * KL)) if good else 0.8 * (1 - sigmoid(BETA * KL - r))
            for r, good in zip(BETA * (arrays[0] - arrays[1]), DESIRABLE, strict=True)
        ],
        1,
    ),
    "bco": Case(
        functools.partial(bco, beta=BETA),
        SINGLES,
        lambda *arrays: [
            cross_entropy(r - 0.2 if good else 0.2 - r)
            for r, good in zip(BETA * (arrays[0] - arrays[1]), DESIRABLE, strict=True)
        ],
        1,
    ),
}
# Their losses are no function of one pair alone.
OF_A_WHOLE_BATCH = {"aot", "aot unpaired", "kto pair"}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_separable_loss = pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in OF_A_WHOLE_BATCH]
)


def gradient_by_differences(case: Case, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """d Σ losses / d each array that is trained, by central differences."""
    exact = [x.astype(np.float64) for x in arrays]
    grads = []
    for trained in exact[: case.num_trained]:
        grad = np.empty_like(trained)
        for i, value in enumerate(trained.copy()):
            trained[i] = value + 1e-6
            above = np.sum(case.by_loop(*exact))
            trained[i] = value - 1e-6
            grad[i] = (above - np.sum(case.by_loop(*exact))) / 2e-6
            trained[i] = value
        grads.append(grad)
    return grads
