"""Losses of preferences against loops over pairs, and their gradients against differences of those.

The loops are in float64 and written from the equations of the papers, pair by pair.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import masked
from rlhfjax.losses import anchored, preference, reference_free, responses, unpaired

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


@each_loss
def test_losses_and_gradients_are_those_of_the_loop(name: str) -> None:
    case = LOSSES[name]
    arrays = tuple(x[0] for x in case.arrays)

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, _ = case.loss(*arrays, reduce=masked.fill)
        return losses.sum(), losses

    grads, losses = jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    np.testing.assert_allclose(losses, case.by_loop(*np.float64(arrays)), rtol=2e-5)
    trained, frozen = grads[: case.num_trained], grads[case.num_trained :]
    for grad, expected in zip(trained, gradient_by_differences(case, arrays), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=1e-6)
    for grad in frozen:
        assert (np.asarray(grad) == 0).all()


@each_loss
def test_only_real_pairs_count_and_as_much_as_they_weigh(name: str) -> None:
    case, mask, weights = LOSSES[name], MASK[0], WEIGHTS[0]
    arrays = tuple(x[0] for x in case.arrays)
    if name in OF_A_WHOLE_BATCH:
        losses = case.by_loop(*(np.float64(x[mask]) for x in arrays))
    else:
        losses = np.array(case.by_loop(*np.float64(arrays)))[mask]
    plain, _ = jax.jit(case.loss)(*arrays, mask)
    np.testing.assert_allclose(plain, np.mean(losses), rtol=2e-5)
    weighted, _ = case.loss(*arrays, mask, weights=weights)
    np.testing.assert_allclose(weighted, np.mean(weights[mask] * losses), rtol=2e-5)
    assert jax.grad(lambda w: case.loss(*arrays, mask, weights=w)[0])(2.0) == 0


@each_loss
def test_masked_pairs_are_ignored_to_the_last_bit(name: str) -> None:
    case = LOSSES[name]

    def differentiated(garbage: list[float]) -> Any:
        *arrays, weights = (x.copy() for x in (*case.arrays, WEIGHTS))
        for shift, array in enumerate((*arrays, weights)):
            array[~MASK] = np.roll(garbage, shift)
        loss = functools.partial(case.loss, weights=weights)
        return jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays, MASK)

    clean, given = differentiated([0.0] * 4), differentiated([np.nan, np.inf, -np.inf, 1e30])
    jax.tree.map(np.testing.assert_array_equal, given, clean)
    for grad in given[1]:
        assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()


@each_loss
def test_without_a_pair_loss_metrics_and_gradient_are_0(name: str) -> None:
    case = LOSSES[name]
    differentiated = jax.value_and_grad(case.loss, tuple(range(len(case.arrays))), has_aux=True)
    (loss, metrics), grads = differentiated(*case.arrays, np.zeros_like(MASK))
    for array in jax.tree.leaves((loss, metrics, grads)):
        assert (np.asarray(array) == 0).all()


@each_loss
def test_margins_of_2000_stay_finite(name: str) -> None:
    case = LOSSES[name]
    certain, hopeless, nothing = np.zeros(B), np.full(B, -2000.0 / BETA), np.zeros(B)
    for pair in (certain, hopeless), (hopeless, certain):
        arrays = tuple(jnp.asarray(x) for x in (*pair, nothing, nothing))[: len(case.arrays)]
        differentiated = jax.value_and_grad(case.loss, tuple(range(len(arrays))), has_aux=True)
        (loss, _), grads = differentiated(*arrays)
        assert np.isfinite([loss, *jnp.concatenate(grads)]).all()


@each_separable_loss
def test_vmapped_is_batched(name: str) -> None:
    case = LOSSES[name]
    mapped, _ = jax.vmap(case.loss)(*case.arrays, MASK)
    batched, _ = case.loss(*case.arrays, MASK)
    counts = MASK.sum(-1)
    np.testing.assert_allclose((mapped * counts).sum() / counts.sum(), batched, rtol=1e-5)


@pytest.mark.parametrize("loss", [preference.aot, preference.aot_unpaired])
def test_ranks_are_those_of_a_group(loss: Callable[..., Any]) -> None:
    loss = functools.partial(loss, beta=BETA, reduce=masked.fill)
    np.testing.assert_array_equal(loss(*PAIRS, MASK)[0], jax.vmap(loss)(*PAIRS, MASK)[0])


@each_loss
def test_results_are_float32(name: str) -> None:
    case = LOSSES[name]
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in case.arrays]
    given = case.loss(*rounded, MASK)
    for array in jax.tree.leaves(given):
        assert array.shape == () and array.dtype == jnp.float32
    expected = case.loss(*(x.astype(jnp.float32) for x in rounded), MASK)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


@each_loss
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    case = LOSSES[name]
    for mask in (MASK[:, :-1], MASK.astype(np.float32)):
        with pytest.raises(AssertionError):
            case.loss(*case.arrays, mask)
    with pytest.raises(AssertionError):
        case.loss(case.arrays[0], case.arrays[1][:, :-1], *case.arrays[2:])


class TestMetrics:
    def test_of_pairs_by_hand(self) -> None:
        mask = jnp.array([True, True, False, True])
        chosen, rejected = jnp.array([1.0, 2.0, 9.0, -3.0]), jnp.array([0.0, 4.0, 0.0, -3.0])
        _, metrics = preference.dpo(
            chosen, rejected, jnp.array([0.0, 1.0, 0.0, 0.0]), jnp.zeros(4), mask, beta=0.5
        )
        expected = {"chosen": -1 / 6, "rejected": 1 / 6, "accuracies": 1 / 3, "margins": -1 / 3}
        assert metrics == {
            f"rewards/{name}": pytest.approx(value) for name, value in expected.items()
        }

    @each_loss
    def test_they_have_no_gradient(self, name: str) -> None:
        case = LOSSES[name]
        for grad in jax.grad(lambda *arrays: sum(case.loss(*arrays)[1].values()), (0, 1))(
            *case.arrays
        ):
            assert (np.asarray(grad) == 0).all()


class TestDpo:
    def test_at_the_reference(self) -> None:
        """Loss log 2, gradient ∓β/2; the common part of both log-probabilities is no matter."""
        refs = (REF_CHOSEN[0], REF_REJECTED[0])

        def loss_of(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
            return preference.dpo(chosen, rejected, *refs, beta=0.3, reduce=masked.sum)[0]

        loss, (chosen, rejected) = jax.value_and_grad(loss_of, (0, 1))(*refs)
        assert loss == pytest.approx(B * np.log(2.0))
        np.testing.assert_allclose(chosen, np.full(B, -0.15), rtol=1e-6)
        np.testing.assert_allclose(rejected, np.full(B, 0.15), rtol=1e-6)
        shifted = loss_of(refs[0] + 2.0, refs[1] + 2.0)
        assert shifted == pytest.approx(B * np.log(2.0), rel=1e-5)

    def test_without_smoothing_cdpo_and_robust_are_dpo(self) -> None:
        plain, _ = preference.dpo(*PAIRS, beta=BETA, reduce=masked.fill)
        for loss in (preference.cdpo, preference.robust):
            given, _ = loss(*PAIRS, beta=BETA, label_smoothing=0.0, reduce=masked.fill)
            np.testing.assert_allclose(given, plain, rtol=1e-6)

    def test_cdpo_with_half_of_the_labels_wrong_does_not_tell_the_responses_apart(self) -> None:
        loss = functools.partial(preference.cdpo, beta=BETA, label_smoothing=0.5)
        swapped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
        np.testing.assert_allclose(loss(*PAIRS)[0], loss(*swapped)[0], rtol=1e-6)

    @pytest.mark.parametrize("loss", [preference.cdpo, preference.exo])
    def test_the_minimum_is_where_the_policy_is_as_sure_as_the_labels(
        self, loss: Callable[..., Any]
    ) -> None:
        best = np.float32(np.log(0.8 / 0.2))

        def loss_of(margin: jax.Array) -> jax.Array:
            return loss(margin, 0 * margin, 0 * margin, 0 * margin, beta=1.0, label_smoothing=0.2)[
                0
            ]

        assert jax.grad(loss_of)(best) == pytest.approx(0.0, abs=1e-6)
        assert jax.grad(loss_of)(best - 0.1) < 0 < jax.grad(loss_of)(best + 0.1)

    def test_exo_is_0_at_its_minimum(self) -> None:
        margin = jnp.log(jnp.array([4.0]))
        loss, _ = preference.exo(
            margin, 0 * margin, 0 * margin, 0 * margin, beta=1.0, label_smoothing=0.2
        )
        assert loss == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize("flipped", [0.1, 0.4])
    def test_robust_is_unbiased_under_flipped_labels(self, flipped: float) -> None:
        swapped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
        right, wrong = (
            preference.robust(*pairs, beta=BETA, label_smoothing=flipped, reduce=masked.fill)[0]
            for pairs in (PAIRS, swapped)
        )
        true, _ = preference.dpo(*PAIRS, beta=BETA, reduce=masked.fill)
        np.testing.assert_allclose((1 - flipped) * right + flipped * wrong, true, rtol=1e-4)

    def test_both_responses_pull_equally(self) -> None:
        for loss in (preference.dpo, preference.hinge, preference.ipo, preference.discopop):
            chosen, rejected = jax.grad(
                lambda *pairs, loss=loss: loss(*pairs, beta=BETA)[0], (0, 1)
            )(*PAIRS)
            np.testing.assert_allclose(chosen, -rejected, rtol=1e-6)

    def test_beta_is_traced(self) -> None:
        betas = jnp.array([0.1, 2.0])
        given = jax.jit(jax.vmap(lambda beta: preference.dpo(*PAIRS, beta=beta)[0]))(betas)
        log_ratios = np.float64(CHOSEN) - REF_CHOSEN - REJECTED + REF_REJECTED
        expected = [np.mean(cross_entropy(beta * log_ratios)) for beta in (0.1, 2.0)]
        np.testing.assert_allclose(given, expected, rtol=1e-5)


class TestIpo:
    def test_the_minimum_is_at_a_difference_of_1_over_2_beta(self) -> None:
        refs = (REF_CHOSEN, REF_REJECTED)
        loss_of = jax.value_and_grad(lambda c: preference.ipo(c, REF_REJECTED, *refs, beta=0.1)[0])
        loss, grad = loss_of(REF_CHOSEN + 5.0)
        assert loss == pytest.approx(0.0, abs=1e-8)
        np.testing.assert_allclose(grad, 0.0, atol=1e-5)

    def test_at_the_reference(self) -> None:
        refs = (REF_CHOSEN, REF_REJECTED)
        assert preference.ipo(*refs, *refs, beta=0.1)[0] == pytest.approx(25.0)


class TestFDivergences:
    LOG_RATIOS = np.array([-3.0, -0.1, 0.0, 0.2, 4.0], np.float32)

    def test_the_reverse_divergence_is_dpo(self) -> None:
        reverse = functools.partial(preference.alpha_derivative, alpha=1.0)
        given = preference.f_dpo(*PAIRS, beta=BETA, derivative=reverse)
        jax.tree.map(np.testing.assert_array_equal, given, preference.dpo(*PAIRS, beta=BETA))

    def test_alpha_near_1_is_near_the_reverse_divergence(self) -> None:
        given = preference.alpha_derivative(self.LOG_RATIOS, alpha=1.0 + 1e-5)
        np.testing.assert_allclose(given, self.LOG_RATIOS, rtol=1e-4)
        grad = jax.grad(lambda x: preference.alpha_derivative(x, alpha=1.0).sum())(self.LOG_RATIOS)
        np.testing.assert_array_equal(grad, np.ones(5))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
    def test_derivatives_are_those_of_the_divergence(self, alpha: float) -> None:
        u = np.exp(np.float64(self.LOG_RATIOS))
        expected = (u ** (alpha - 1) - 1) / (alpha - 1)
        given = preference.alpha_derivative(self.LOG_RATIOS, alpha=alpha)
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-7)
        given = preference.js_derivative(self.LOG_RATIOS) + np.log(2)
        np.testing.assert_allclose(given, np.log(2 * u / (1 + u)), rtol=1e-4, atol=1e-6)


class TestAot:
    def test_by_hand(self) -> None:
        """Margins 3, 1, 2 meet the reference's 0, 20, 10 in their order: 20, 0, 10."""
        zeros = jnp.zeros(3)
        given, _ = preference.aot(
            jnp.array([3.0, 1.0, 2.0]),
            zeros,
            jnp.array([0.0, 20.0, 10.0]),
            zeros,
            beta=0.1,
            reduce=masked.fill,
        )
        np.testing.assert_allclose(given, cross_entropy(np.array([-1.7, 0.1, -0.8])), rtol=1e-6)

    def test_where_every_pair_has_its_own_rank_it_is_dpo(self) -> None:
        arrays = [np.sort(x[0]) * sign for x, sign in zip(PAIRS, (1, -1, 1, -1), strict=True)]
        plain, _ = preference.dpo(*arrays, beta=BETA)
        np.testing.assert_allclose(preference.aot(*arrays, beta=BETA)[0], plain, rtol=1e-6)


class TestAnchored:
    REFS = (REF_CHOSEN, REF_REJECTED)

    @pytest.mark.parametrize(
        "loss, at_reference, chosen, rejected",
        [
            # Per pair: the loss, and its derivatives by the two log-probabilities, β = 0.4.
            (anchored.nca, 2 * np.log(2), -0.1, 0.1),
            (anchored.apo_zero, 1.0, -0.1, 0.1),
            (anchored.apo_down, 1.0, 0.0, 0.1),
            (anchored.bco_pair, 2 * np.log(2), -0.2, 0.2),
            (anchored.kto_pair, 0.5, -0.05, 0.05),
            (anchored.sppo, 2 * 1.25**2, -2.5, 2.5),
        ],
    )
    def test_at_the_reference(
        self, loss: Callable[..., Any], at_reference: float, chosen: float, rejected: float
    ) -> None:
        def loss_of(*policy: jax.Array) -> jax.Array:
            return loss(*policy, *self.REFS, beta=0.4, reduce=masked.sum)[0]

        value, grads = jax.value_and_grad(loss_of, (0, 1))(*self.REFS)
        assert value == pytest.approx(at_reference * CHOSEN.size)
        np.testing.assert_allclose(grads[0], np.full_like(CHOSEN, chosen), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(grads[1], np.full_like(CHOSEN, rejected), rtol=1e-5)

    def test_sppo_is_0_where_the_rewards_are_a_half_up_and_down(self) -> None:
        policy = (REF_CHOSEN + 2.0, REF_REJECTED - 2.0)
        assert anchored.sppo(*policy, *self.REFS, beta=0.25)[0] == pytest.approx(0.0, abs=1e-9)


class TestReferenceFree:
    def test_simpo_by_hand(self) -> None:
        loss, metrics = reference_free.simpo(
            jnp.array([-0.5]), jnp.array([-1.5]), beta=2.0, margin=0.5
        )
        assert loss == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-6)
        assert metrics["rewards/chosen"] == -1.0 and metrics["rewards/rejected"] == -3.0

    def test_a_ratio_of_margin_and_beta_is_a_constant_reference(self) -> None:
        ratio = jnp.full_like(CHOSEN, 0.3)
        given, _ = reference_free.simpo(*MEANS, beta=2.0, margin=0.6)
        expected, _ = preference.dpo(*MEANS, ratio, jnp.zeros_like(ratio), beta=2.0)
        np.testing.assert_allclose(given, expected, rtol=1e-5)

    def test_cpo_is_dpo_with_a_reference_that_knows_nothing(self) -> None:
        nothing = jnp.zeros_like(CHOSEN)
        given, _ = reference_free.cpo(CHOSEN, REJECTED, beta=BETA)
        expected, _ = preference.dpo(CHOSEN, REJECTED, nothing, nothing, beta=BETA)
        np.testing.assert_allclose(given, expected, rtol=1e-6)

    def test_slic_by_hand(self) -> None:
        given, _ = reference_free.slic(
            jnp.array([-3.0, -1.0]), jnp.array([-4.0, -1.5]), margin=0.75, reduce=masked.fill
        )
        np.testing.assert_allclose(given, [0.0, 0.25])

    def test_alpha_rewards(self) -> None:
        log_probs = jnp.log(jnp.array([0.25, 1.0]))
        given = reference_free.alpha_rewards(log_probs, alpha=0.5)
        np.testing.assert_allclose(given, [(1 - 2.0) / 0.5, 0.0], rtol=1e-6)
        np.testing.assert_allclose(reference_free.alpha_rewards(log_probs, alpha=0.0), log_probs)
        certain = jnp.array([-3000.0])
        rewards, grad = jax.value_and_grad(
            lambda x: reference_free.alpha_rewards(x, alpha=0.5).sum()
        )(certain)
        assert np.isfinite(rewards) and grad == 0


class TestOrpo:
    def test_by_hand(self) -> None:
        """Odds of 4 against odds of 1."""
        loss, metrics = reference_free.orpo(
            jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.5])), beta=0.1
        )
        assert loss == pytest.approx(0.1 * np.log(1.25), rel=1e-5)
        assert metrics["odds_ratio"] == pytest.approx(4.0, rel=1e-5)
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(4.0), rel=1e-5)
        assert metrics["log_odds_ratio"] == pytest.approx(-np.log(1.25), rel=1e-5)
        assert metrics["rewards/chosen"] == pytest.approx(0.1 * np.log(0.8), rel=1e-5)

    @pytest.mark.parametrize("log_prob", [-1e-6, -1e-3, -0.69, -0.7, -3.0, -60.0])
    def test_log_odds_keep_their_digits(self, log_prob: float) -> None:
        def loss_of(chosen: jax.Array) -> tuple[jax.Array, dict]:
            return reference_free.orpo(chosen, jnp.log(jnp.array([0.5])), beta=1.0)

        (_, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(
            jnp.array([log_prob], jnp.float32)
        )
        exact = np.float64(np.float32(log_prob))
        odds = np.exp(exact) / -np.expm1(exact)
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(odds), rel=1e-5, abs=1e-6)
        slope = -sigmoid(-np.log(odds)) / -np.expm1(exact)
        np.testing.assert_allclose(grad, slope, rtol=2e-5)

    def test_a_certain_response_has_finite_odds_and_no_gradient(self) -> None:
        for pair in ([0.0], [-1.0]), ([-1.0], [0.0]), ([0.0], [0.0]):
            arrays = tuple(jnp.array(x) for x in pair)
            (loss, metrics), grads = jax.value_and_grad(
                lambda *pair: reference_free.orpo(*pair, beta=0.1), (0, 1), has_aux=True
            )(*arrays)
            assert np.isfinite([loss, *metrics.values(), *grads[0], *grads[1]]).all()
            for array, grad in zip(arrays, grads, strict=True):
                assert (array == 0) <= (grad == 0)
        bound = np.log(1e-3)
        _, metrics = reference_free.orpo(
            jnp.zeros(1), jnp.log(jnp.array([0.5])), beta=0.1, log_prob_max=np.log1p(-1e-3)
        )
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(0.999) - bound, rel=1e-4)


class TestUnpaired:
    def test_kl_of_mismatched_responses(self) -> None:
        new, ref = jnp.array([1.0, 2.0, 9.0]), jnp.array([0.0, 4.0, 0.0])
        assert unpaired.reference_kl(new, ref) == pytest.approx(8 / 3)
        assert unpaired.reference_kl(new, ref, jnp.array([True, True, False])) == 0
        assert unpaired.reference_kl(new, ref, jnp.array([True, False, False])) == 1
        assert unpaired.reference_kl(new, ref, jnp.zeros(3, bool)) == 0

    def test_kto_at_the_reference(self) -> None:
        def loss_of(log_probs: jax.Array) -> tuple[jax.Array, dict]:
            return unpaired.kto(
                log_probs,
                REF_CHOSEN[0],
                DESIRABLE,
                jnp.zeros(()),
                beta=0.4,
                desirable_weight=1.5,
                reduce=masked.sum,
            )

        (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(REF_CHOSEN[0])
        assert loss == pytest.approx(3 * 0.75 + 3 * 0.5)
        np.testing.assert_allclose(grad, np.where(DESIRABLE, -0.15, 0.1), rtol=1e-6)
        assert metrics == {
            "rewards/chosen": 0,
            "rewards/rejected": 0,
            "rewards/margins": 0,
            "kl": 0,
        }

    def test_the_reference_point_of_kto_has_no_gradient(self) -> None:
        def loss_of(log_probs: jax.Array) -> jax.Array:
            kl = unpaired.reference_kl(log_probs, REF_CHOSEN[0])
            return unpaired.kto(CHOSEN[0], REF_CHOSEN[0], np.ones(B, bool), kl, beta=BETA)[0]

        higher = REF_CHOSEN[0] + 1.0
        assert abs(loss_of(higher) - loss_of(REF_CHOSEN[0])) > 0.01
        assert (np.asarray(jax.grad(loss_of)(higher)) == 0).all()

    def test_the_shift_of_bco_has_no_gradient(self) -> None:
        def loss_of(log_probs: jax.Array) -> jax.Array:
            rewards = preference.implicit_rewards(log_probs, REF_CHOSEN[0], beta=BETA)
            return unpaired.bco(CHOSEN[0], REF_CHOSEN[0], DESIRABLE, rewards.mean(), beta=BETA)[0]

        assert (np.asarray(jax.grad(loss_of)(CHOSEN[0])) == 0).all()

    def test_metrics_by_hand(self) -> None:
        arrays = (jnp.array([1.0, 2.0, 3.0, 99.0]), jnp.zeros(4))
        desirable, mask = jnp.array([True, False, True, True]), jnp.array([True, True, True, False])
        _, metrics = unpaired.kto(*arrays, desirable, jnp.float32(0.25), mask, beta=0.5)
        assert metrics == {
            "rewards/chosen": 1.0,
            "rewards/rejected": 1.0,
            "rewards/margins": 0.0,
            "kl": 0.25,
        }
        _, metrics = unpaired.bco(*arrays, jnp.ones(4, bool), jnp.float32(0.0), mask, beta=0.5)
        assert metrics == {
            "rewards/chosen": 1.0,
            "rewards/rejected": 0.0,
            "rewards/margins": 1.0,
        }

    def test_labels_must_be_bool(self) -> None:
        for loss in (unpaired.kto, unpaired.bco):
            with pytest.raises(AssertionError):
                loss(CHOSEN[0], REF_CHOSEN[0], DESIRABLE.astype(np.int32), 0.0, beta=BETA)


class TestImplicitRewards:
    def test_by_hand(self) -> None:
        mask = jnp.array([True, False])
        new, ref = jnp.array([-1.0, jnp.nan]), jnp.array([-3.0, jnp.inf])
        rewards, grads = jax.value_and_grad(
            lambda *arrays: preference.implicit_rewards(*arrays, mask, beta=0.5).sum(), (0, 1)
        )(new, ref)
        assert rewards == 1.0
        np.testing.assert_array_equal(grads, [[0.5, 0.0], [0.0, 0.0]])


class TestResponses:
    MASK = jnp.array([[False, True, True, False, True]])
    OTHER = jnp.array([[True, True, False]])
    LOG_PROBS = jnp.array([[jnp.nan, -1.0, -2.0, -jnp.inf, -4.0]])

    @pytest.mark.parametrize("coef, expected", [(1.0, -7.0), (0.5, -5.0), (0.0, -3.0)])
    def test_tokens_beyond_the_other_response_weigh_less(
        self, coef: float, expected: float
    ) -> None:
        def total(log_probs: jax.Array) -> jax.Array:
            return responses.length_desensitised(
                log_probs, self.MASK, self.OTHER, length_coef=coef
            ).sum()

        given, grad = jax.value_and_grad(total)(self.LOG_PROBS)
        assert given == expected
        np.testing.assert_array_equal(grad, [[0.0, 1.0, 1.0, 0.0, coef]])

    def test_a_longer_other_response_changes_nothing(self) -> None:
        given = responses.length_desensitised(
            self.LOG_PROBS, self.MASK, jnp.ones((1, 9), bool), length_coef=0.0
        )
        np.testing.assert_array_equal(given, [-7.0])

    def test_two_draws_collide_with_the_probability_of_the_sum_of_squares(self) -> None:
        logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
        given = responses.log_collision(logits)
        np.testing.assert_allclose(given, [np.log(0.375), 0.0], rtol=1e-6)
        large = responses.log_collision(jnp.full((1, 4), 3e4))
        np.testing.assert_allclose(large, [-np.log(4.0)], rtol=1e-6)

    def test_wpo_weights_by_hand(self) -> None:
        """exp(mean of (-1 - -2, -2 - -1.5)) · exp(-3 - -1)."""
        arrays = (
            jnp.array([[-1.0, -2.0, jnp.nan]]),
            jnp.array([[-3.0, jnp.inf]]),
            jnp.array([[-2.0, -1.5, jnp.nan]]),
            jnp.array([[-1.0, jnp.nan]]),
        )
        masks = (jnp.array([[True, True, False]]), jnp.array([[True, False]]))
        weights = responses.wpo_weights(*arrays, *masks)
        np.testing.assert_allclose(weights, [np.exp(0.25 - 2.0)], rtol=1e-6)
        grads = jax.grad(lambda *arrays: responses.wpo_weights(*arrays, *masks).sum(), (0, 1, 2))(
            *arrays[:3], arrays[3]
        )
        for grad in grads:
            assert (np.asarray(grad) == 0).all()
        nothing = tuple(jnp.zeros_like(mask) for mask in masks)
        np.testing.assert_array_equal(responses.wpo_weights(*arrays, *nothing), [1.0])
