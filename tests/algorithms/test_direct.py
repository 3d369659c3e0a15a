"""Direct methods: each loss by NumPy from a table of logits, and what no loss may read."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, chosen, left_padded, log_softmax

from rlhfjax.algorithms import cpo, direct, dpo, ipo, kto, orpo, simpo
from rlhfjax.types import PreferenceBatch

V, B, P, T = 7, 6, 4, 5
MODEL = bigram(V)
PARAMS, REF = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
RNG = np.random.default_rng(1)
CHOSEN, REJECTED = RNG.integers(0, V, (2, B, T)).astype(np.int32)
# The second row lacks one side, the fourth the other and the fifth both.
CHOSEN_MASK = np.arange(T) < np.array([5, 2, 3, 0, 0, 1])[:, None]
REJECTED_MASK = np.arange(T) < np.array([2, 0, 4, 5, 0, 3])[:, None]
PAIRS = [0, 2, 5]
BATCH = PreferenceBatch(
    *left_padded(RNG, [4, 2, 1, 3, 4, 2], P, 0, V), CHOSEN, CHOSEN_MASK, REJECTED, REJECTED_MASK
)
PROBS = np.float32([0.9, 0.3, 0.5, 0.8, 0.1, 0.2])
LABELS = {"certain": BATCH, "soft": replace(BATCH, chosen_probs=PROBS)}

NAMES = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")} | {
    "rewards/margins",
    "rewards/accuracies",
    "loss",
}
ODDS = {"log_odds_chosen", "log_odds_ratio", "odds_ratio"}


class Side(NamedTuple):
    """The log-probabilities of a response's tokens in float64."""

    now: np.ndarray
    ref: np.ndarray


def side(tokens: np.ndarray, mask: np.ndarray, row: int, prompt: int) -> Side:
    response = tokens[row][mask[row]]
    before = np.concatenate([BATCH.prompts[prompt, -1:], response[:-1]])
    return Side(*(chosen(log_softmax(p["table"])[before], response) for p in (PARAMS, REF)))


def sides(shift: int = 0) -> list[tuple[Side, Side]]:
    """Of each pair, after its own prompt or that of another pair."""
    prompts = PAIRS[shift:] + PAIRS[:shift]
    return [
        (side(CHOSEN, CHOSEN_MASK, *at), side(REJECTED, REJECTED_MASK, *at))
        for at in zip(PAIRS, prompts, strict=True)
    ]


def softplus(x: float) -> float:
    return np.log1p(np.exp(x))


def log_ratio(response: Side) -> float:
    return response.now.sum() - response.ref.sum()


def likelihood(firsts: list[Side], weights: list[float]) -> float:
    tokens = sum(len(first.now) for first in firsts)
    return -sum(w * first.now.sum() for w, first in zip(weights, firsts, strict=True)) / tokens


def of_pairs(equation: Callable[[Side, Side, Any], float]) -> Callable[..., float]:
    def loss(pairs: list[tuple[Side, Side]], weights: list[float], hyper: Any) -> float:
        each = [equation(*pair, hyper) for pair in pairs]
        return float(np.mean(np.array(weights) * each))

    return loss


@of_pairs
def dpo_loss(c: Side, r: Side, hyper: dpo.Hyperparameters) -> float:
    margin = hyper.beta * (log_ratio(c) - log_ratio(r))
    smoothing = hyper.label_smoothing
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


@of_pairs
def ipo_loss(c: Side, r: Side, hyper: ipo.Hyperparameters) -> float:
    return (log_ratio(c) - log_ratio(r) - 1 / (2 * hyper.beta)) ** 2


@of_pairs
def kto_loss(c: Side, r: Side, hyper: kto.Hyperparameters) -> float:
    z = max(0.0, np.mean([log_ratio(x) for pair in sides(1) for x in pair]))
    gain, loss = (hyper.beta * (log_ratio(x) - z) for x in (c, r))
    desirable = hyper.desirable_weight / (1 + np.exp(gain))
    return 0.5 * (desirable + hyper.undesirable_weight / (1 + np.exp(-loss)))


@of_pairs
def simpo_loss(c: Side, r: Side, hyper: simpo.Hyperparameters) -> float:
    return softplus(hyper.margin - hyper.beta * (c.now.mean() - r.now.mean()))


def cpo_loss(pairs: list[tuple[Side, Side]], weights: list[float], hyper: Any) -> float:
    def contrast(c: Side, r: Side, hyper: Any) -> float:
        return softplus(-hyper.beta * (c.now.sum() - r.now.sum()))

    text = likelihood([c for c, _ in pairs], weights)
    return of_pairs(contrast)(pairs, weights, hyper) + hyper.likelihood_coef * text


def orpo_loss(pairs: list[tuple[Side, Side]], weights: list[float], hyper: Any) -> float:
    def odds(c: Side, r: Side, hyper: Any) -> float:
        c_odds, r_odds = (p / (1 - p) for p in (np.exp(c.now.mean()), np.exp(r.now.mean())))
        return hyper.beta * softplus(-np.log(c_odds / r_odds))

    return likelihood([c for c, _ in pairs], weights) + of_pairs(odds)(pairs, weights, hyper)


class Method(NamedTuple):
    """A method, its numbers, its loss, which rewards it reports, and names of its own."""

    module: ModuleType
    hyper: Any
    loss: Callable[..., float]
    reward: Callable[[Side], float]
    names: set[str] = NAMES
    has_reference: bool = True


METHODS = {
    "dpo": Method(dpo, dpo.Hyperparameters(beta=0.7), dpo_loss, log_ratio),
    "cdpo": Method(dpo, dpo.Hyperparameters(0.7, 0.2), dpo_loss, log_ratio),
    "ipo": Method(ipo, ipo.Hyperparameters(0.4), ipo_loss, log_ratio),
    "kto": Method(
        kto,
        kto.Hyperparameters(0.6, 1.5, 0.7),
        kto_loss,
        log_ratio,
        NAMES - {"rewards/accuracies"} | {"kl"},
    ),
    "orpo": Method(
        orpo,
        orpo.Hyperparameters(0.3),
        orpo_loss,
        lambda x: x.now.mean(),
        NAMES | ODDS | {"nll_loss"},
        has_reference=False,
    ),
    "simpo": Method(
        simpo,
        simpo.Hyperparameters(2.0, 0.5),
        simpo_loss,
        lambda x: x.now.mean(),
        has_reference=False,
    ),
    "cpo": Method(
        cpo,
        cpo.Hyperparameters(0.4, 0.8),
        cpo_loss,
        lambda x: x.now.sum(),
        NAMES | {"nll_loss"},
        has_reference=False,
    ),
}


@cache
def compiled(method: str) -> Callable[..., Any]:
    loss, hyper = METHODS[method].module.loss, METHODS[method].hyper

    def of(params: Any, batch: PreferenceBatch, ref: Any) -> Any:
        return loss(params, batch, ref, hyper, model=MODEL)

    return jax.jit(jax.value_and_grad(of, has_aux=True))


def measure(method: str, batch: PreferenceBatch, ref: Any = REF, params: Any = PARAMS) -> Any:
    """((loss, metrics), gradient)."""
    return compiled(method)(params, batch, ref)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


class TestLoss:
    @pytest.mark.parametrize("labels", LABELS)
    def test_is_that_of_a_loop_over_pairs(self, method: str, labels: str) -> None:
        _, hyper, equation, *_ = METHODS[method]
        pairs = sides()
        probs = PROBS[PAIRS].astype(float) if labels == "soft" else np.ones(len(PAIRS))
        expected = equation(pairs, probs, hyper)
        if labels == "soft":
            expected += equation([(r, c) for c, r in pairs], 1 - probs, hyper)
        (loss, _), _ = measure(method, LABELS[labels])
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_metrics_are_means_over_pairs(self, method: str) -> None:
        _, hyper, _, reward, names, _ = METHODS[method]
        metrics = measure(method, BATCH)[0][1]
        firsts, seconds = zip(*sides(), strict=True)
        c, r = (hyper.beta * np.array([reward(x) for x in xs]) for xs in (firsts, seconds))
        expected = {
            "rewards/chosen": c.mean(),
            "rewards/rejected": r.mean(),
            "rewards/margins": (c - r).mean(),
            "rewards/accuracies": (c > r).mean(),
            "logps/chosen": np.mean([x.now.sum() for x in firsts]),
            "logps/rejected": np.mean([x.now.sum() for x in seconds]),
            "nll_loss": likelihood(list(firsts), [1.0] * len(PAIRS)),
        }
        assert set(metrics) | {"loss"} == names
        for name in names & set(expected):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name

    def test_a_certain_label_is_a_probability_of_one(self, method: str) -> None:
        certain = replace(BATCH, chosen_probs=np.ones(B, np.float32))
        assert_close(measure(method, certain), measure(method, BATCH), atol=1e-6)

    # KTO's z is held while the rest is differentiated: see `TestKto`.
    @pytest.mark.parametrize("method", sorted(METHODS.keys() - {"kto"}))
    def test_gradient_is_the_slope_of_the_loss(self, method: str) -> None:
        direction = jax.random.normal(jax.random.key(2), (V, V))

        def at(step: float) -> Any:
            params = {"table": PARAMS["table"] + step * direction}
            return measure(method, LABELS["soft"], params=params)

        (_, grads), (ahead, _), (behind, _) = at(0.0), at(1e-2), at(-1e-2)
        slope = float(ahead[0] - behind[0]) / 2e-2
        assert (grads["table"] * direction).sum() == pytest.approx(slope, rel=1e-2)


class TestWhatIsNoPair:
    def test_counts_nowhere_whatever_it_holds(self, method: str) -> None:
        others = [row for row in range(B) if row not in PAIRS]
        filled = jax.tree.map(np.array, LABELS["soft"])
        filled.prompts[others] = 3
        filled.prompt_mask[others] = False
        filled.chosen[others], filled.rejected[others] = 1, 2
        filled.chosen_probs[others] = np.nan
        assert_same(measure(method, filled), measure(method, LABELS["soft"]))

    def test_may_as_well_be_left_out(self, method: str) -> None:
        alone = jax.tree.map(lambda x: x[PAIRS], LABELS["soft"])
        assert_close(measure(method, alone), measure(method, LABELS["soft"]), atol=1e-5)

    def test_may_be_all_there_is(self, method: str) -> None:
        nothing = replace(BATCH, chosen_mask=np.zeros((B, T), bool))
        (loss, metrics), grads = measure(method, nothing)
        assert loss == 0.0
        assert not grads["table"].any()
        assert all(np.isfinite(x) for x in metrics.values())


def test_padding_is_not_read(method: str) -> None:
    def polluted(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask, tokens, 6)

    batch = replace(
        BATCH,
        prompts=polluted(BATCH.prompts, BATCH.prompt_mask),
        chosen=polluted(CHOSEN, CHOSEN_MASK),
        rejected=polluted(REJECTED, REJECTED_MASK),
    )
    assert (batch.chosen != CHOSEN).any()
    assert_same(measure(method, batch), measure(method, BATCH))


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].has_reference])
def test_reference_free_methods_take_none(method: str) -> None:
    assert_same(measure(method, BATCH, ref=None), measure(method, BATCH))


def test_a_step_is_a_descent_along_the_gradient(method: str) -> None:
    module, hyper, *_, names, _ = METHODS[method]
    optimizer = optax.sgd(0.1)
    state = module.init(PARAMS, optimizer)
    after, metrics = module.make_step(MODEL, optimizer)(state, BATCH, REF, hyper)
    (loss, measured), grads = measure(method, BATCH)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads), atol=1e-6)
    assert set(metrics) == names | {"val/num_skipped"}
    assert_close(metrics, measured | {"loss": loss, "val/num_skipped": 0}, atol=1e-6)
    assert after.step == 1
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        state.params["table"].block_until_ready()
    assert not PARAMS["table"].is_deleted()


class TestKto:
    def test_z_is_the_divergence_of_responses_to_the_next_pairs_prompt(self) -> None:
        z = kto.mismatched_kl(PARAMS, BATCH.labelled, REF, model=MODEL)
        expected = np.mean([log_ratio(x) for pair in sides(1) for x in pair])
        assert expected > 0.1
        assert z == pytest.approx(expected, rel=1e-5)
        assert measure("kto", BATCH)[0][1]["kl"] == z
        # What follows its own prompt, or that of the pair before, diverges by something else.
        for shift in (0, 2):
            other = np.mean([log_ratio(x) for pair in sides(shift) for x in pair])
            assert abs(other - expected) > 1e-2

    def test_z_is_never_negative(self) -> None:
        assert kto.mismatched_kl(REF, BATCH.labelled, PARAMS, model=MODEL) == 0.0

    def test_z_has_no_gradient(self) -> None:
        def loss(params: Any, z_params: Any) -> jax.Array:
            z = kto.mismatched_kl(z_params, BATCH.labelled, REF, model=MODEL)
            _, hyper, *_ = METHODS["kto"]
            both = direct.responses(params, BATCH, REF, model=MODEL)
            labels = np.repeat([1.0, 0.0], B)
            mask = np.tile(BATCH.pairs, 2)
            return kto.response_loss(both, labels, hyper, kl=z, mask=mask)[0]

        held, through = jax.grad(loss, argnums=(0, 1))(PARAMS, PARAMS)
        assert not through["table"].any()
        assert_close(measure("kto", BATCH)[1], held, atol=1e-6)
