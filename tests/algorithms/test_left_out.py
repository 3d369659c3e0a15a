"""Updates that are left out: those whose gradient is not finite, and those that teach nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, numbers

from rlhfjax import models
from rlhfjax.algorithms import (
    cpo,
    dapo,
    dpo,
    grpo,
    ipo,
    kto,
    online_dpo,
    orpo,
    ppo,
    reinforce,
    rejection_sampling,
    remax,
    reward_model,
    rloo,
    sft,
    simpo,
    train_state,
)
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout

BAD = [np.nan, np.inf, -np.inf]
OPTIMIZER = optax.adamw(1e-2)


class TestUpdate:
    PARAMS = {"a": jnp.array([1.0, -0.0]), "b": jnp.float32(3.0)}  # noqa: RUF012
    GRADS = {"a": jnp.array([0.5, 0.25]), "b": jnp.float32(1.0)}  # noqa: RUF012

    @pytest.mark.parametrize("bad", BAD)
    def test_a_single_number_leaves_out_the_whole(self, bad: float) -> None:
        state = OPTIMIZER.init(self.PARAMS)
        for grads in (
            {**self.GRADS, "b": jnp.float32(bad)},
            {**self.GRADS, "a": self.GRADS["a"].at[1].set(bad)},
        ):
            *after, finite = train_state.update(self.PARAMS, state, grads, optimizer=OPTIMIZER)
            assert_same(after, [self.PARAMS, state])
            assert np.signbit(after[0]["a"]).tolist() == [False, True]
            assert not finite

    def test_finite_gradients_are_those_of_optax(self) -> None:
        state = OPTIMIZER.init(self.PARAMS)
        *after, finite = train_state.update(self.PARAMS, state, self.GRADS, optimizer=OPTIMIZER)
        updates, expected = OPTIMIZER.update(self.GRADS, state, self.PARAMS)
        assert_same(after, [optax.apply_updates(self.PARAMS, updates), expected])
        assert finite

    def test_gradients_may_be_as_large_as_they_can(self) -> None:
        largest = {"a": jnp.array([np.finfo(np.float32).max] * 2), "b": jnp.float32(-1e38)}
        sgd = optax.sgd(1e-30)
        *_, finite = train_state.update(self.PARAMS, sgd.init(self.PARAMS), largest, optimizer=sgd)
        assert finite


def descended(rows: np.ndarray, wanted: np.ndarray, key: jax.Array) -> Any:
    """Two epochs over the rows, one a minibatch; the gradient is the row itself."""
    optimizer = optax.sgd(1.0, momentum=0.5)
    params = jnp.float32(0.0)
    return train_state.descend(
        lambda p, row: (p * row["x"].sum(), {"x": row["x"].sum()}),
        params,
        optimizer.init(params),
        {"x": rows, "wanted": wanted},
        key,
        wanted=lambda row: row["wanted"].all(),
        optimizer=optimizer,
        num_epochs=2,
        num_minibatches=len(rows),
    )


DESCENDED = jax.jit(jax.vmap(descended))
ROWS = np.float32([1, 2, 4, 8, 16])


def by_hand(order: np.ndarray, left_out: np.ndarray) -> tuple[float, float]:
    """The parameter and the momentum, in whole powers of two and so exact."""
    param = momentum = 0.0
    for x, leave in zip(order, left_out, strict=True):
        if not leave:
            momentum = 0.5 * momentum + x
            param -= momentum
    return param, momentum


@pytest.mark.parametrize("bad", BAD)
def test_in_the_midst_of_others_an_update_is_as_if_it_were_not_there(bad: float) -> None:
    rows, wanted = np.stack([ROWS] * 3), np.ones((3, 5), bool)
    rows[1, 2], rows[1, 4] = bad, bad
    wanted[2, 3] = False
    keys = jnp.stack([jax.random.key(0)] * 3)
    params, (trace, _), metrics = DESCENDED(rows, wanted, keys)
    order = np.array(metrics["x"])
    assert np.isfinite(order[[0, 2]]).all()
    left_out = [np.zeros(10, bool), ~np.isfinite(order[1]), order[2] == ROWS[3]]
    assert [x.sum() for x in left_out] == [0, 4, 2]
    for member in range(3):
        expected = by_hand(order[member], left_out[member])
        assert (params[member], trace.trace[member]) == expected
        made = order[member][~left_out[member]]
        of_member = {name: x[member] for name, x in metrics.items()}
        assert train_state.over_updates(of_member)["x"] == np.float32(made.mean())
    # What teaches nothing is no fault.
    np.testing.assert_array_equal(metrics["val/num_skipped"], [left_out[0], left_out[1], [0] * 10])


def test_a_mean_over_no_update_is_zero() -> None:
    measured = {"x": jnp.full(3, jnp.nan), "made": jnp.zeros(3, bool)}
    metrics = train_state.over_updates(measured | {"val/num_skipped": jnp.ones(3, int)})
    assert metrics == {"x": 0.0, "val/num_skipped": 3}


V, N, P, T, MARK = 7, 4, 3, 4, 6
PLAIN = bigram(V)
RNG = np.random.default_rng(0)


def explosive() -> LanguageModel:
    """A bigram model with a finite loss, and an infinite gradient wherever MARK is in the batch."""

    def init(key: jax.Array) -> Params:
        return PLAIN.init(key) | {"fuse": jnp.float32(0.0)}

    def hidden(params: Params, tokens: Any, attention_mask: Any, *, first: int = 0) -> jax.Array:
        fuse = params["fuse"] - jax.lax.stop_gradient(params["fuse"])
        root = jnp.sqrt(fuse + jnp.where((tokens == MARK).any(), 0.0, 1.0))
        return PLAIN.hidden(params, tokens, attention_mask, first=first) + 1e-3 * root

    return PLAIN._replace(init=init, hidden=hidden)


MODEL = explosive()
SCALAR = models.scalar_model(MODEL, models.linear_head(V, stddev=0.5))
ACTOR_CRITIC = models.separate_trunks(MODEL, SCALAR)
REF = MODEL.init(jax.random.key(1))


class Learner(NamedTuple):
    """An algorithm at work on N prompts: its start, a step, how many updates are in it."""

    start: Callable[[], Any]
    step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    num_updates: int = 1
    group_size: int = 1


def samples_of(group_size: int, marked: tuple[int, ...]) -> Rollout:
    """N groups of responses; the prompts of the marked ones begin with MARK."""
    rng = np.random.default_rng(0)
    rows = N * group_size
    tokens = rng.integers(1, MARK, (rows, P + T)).astype(np.int32)
    first = tokens[:, 0].reshape(N, group_size)
    first[list(marked)] = MARK
    tokens[:, 0] = first.ravel()
    mask = np.arange(T) < rng.integers(1, T + 1, (rows, 1))
    log_probs = np.where(mask, -rng.random((rows, T)), 0).astype(np.float32)
    return Rollout(tokens, np.concatenate([np.ones((rows, P), bool), mask], 1), mask, log_probs)


def scores_of(group_size: int, unscored: tuple[int, ...] = ()) -> np.ndarray:
    scores = np.random.default_rng(1).normal(size=(N, group_size)).astype(np.float32)
    scores[list(unscored)] = np.nan
    return scores.ravel()


def sampling(module: ModuleType, changes: dict[str, int], group_size: int) -> Learner:
    is_ppo = module is ppo
    model: Any = ACTOR_CRITIC if is_ppo else MODEL
    params = model.init(jax.random.key(0))
    config = module.Config(T, 0, num_epochs=2, num_minibatches=N, **changes)
    _, learn = module.make_halves(model, OPTIMIZER, config)
    more = {"kl_coef": 0.1} if is_ppo else {}
    hyper = module.Hyperparameters()

    def step(
        state: Any, marked: tuple[int, ...], unscored: tuple[int, ...] = (), ref: Params = REF
    ) -> Any:
        samples, scores = samples_of(group_size, marked), scores_of(group_size, unscored)
        return learn(state, samples, scores, ref, hyper)

    def start() -> Any:
        return module.init(params, OPTIMIZER, jax.random.key(2), **more)

    return Learner(start, step, 2 * N, group_size)


def pairs(marked: tuple[int, ...]) -> PreferenceBatch:
    tokens = np.random.default_rng(0).integers(1, MARK, (3, N, T)).astype(np.int32)
    tokens[0, list(marked), 0] = MARK
    mask = np.ones((N, T), bool)
    return PreferenceBatch(tokens[0], mask, tokens[1], mask, tokens[2], mask)


def supervised(module: ModuleType) -> Learner:
    if module is sft:
        update = sft.make_step(MODEL, OPTIMIZER)
        mask = np.ones((N, T), bool)
        return Learner(
            lambda: sft.init(MODEL.init(jax.random.key(0)), OPTIMIZER),
            lambda state, marked: update(state, pairs(marked).prompts, mask, mask),
        )
    if module is reward_model:
        update = reward_model.make_step(SCALAR, OPTIMIZER)
        return Learner(
            lambda: reward_model.init(SCALAR.init(jax.random.key(0)), OPTIMIZER),
            lambda state, marked: update(state, pairs(marked)),
        )
    update, hyper = module.make_step(MODEL, OPTIMIZER), module.Hyperparameters()
    return Learner(
        lambda: module.init(MODEL.init(jax.random.key(0)), OPTIMIZER),
        lambda state, marked: update(state, pairs(marked), REF, hyper),
    )


# The others have the `learn` of these.
SAMPLING = {
    "ppo": (ppo, {}, 1),
    "reinforce": (reinforce, {}, 1),
    "rloo": (rloo, {"group_size": 3}, 3),
    "remax": (remax, {}, 2),
    "grpo": (grpo, {"group_size": 3}, 3),
    "dapo": (dapo, {"group_size": 3}, 3),
    "online_dpo": (online_dpo, {}, 2),
    "rejection_sampling": (rejection_sampling, {"group_size": 3}, 3),
}
SUPERVISED = {
    module.__name__.split(".")[-1]: module
    for module in (sft, reward_model, dpo, ipo, kto, simpo, cpo, orpo)
}


@cache
def learner_of(name: str) -> Learner:
    if name in SUPERVISED:
        return supervised(SUPERVISED[name])
    module, changes, group_size = SAMPLING[name]
    return sampling(module, changes, group_size)


def count_of(state: Any) -> int:
    """Updates that Adam made."""
    return int(state.opt_state[0].count)


def trained(state: Any) -> Any:
    return state.params, state.opt_state


@pytest.mark.parametrize("name", [*SAMPLING, *SUPERVISED])
class TestGradientsThatAreNotFinite:
    def test_leave_everything_as_it_was_and_are_counted(self, name: str) -> None:
        own = learner_of(name)
        # A step before, so that Adam has moments to move by.
        before, metrics = own.step(own.start(), ())
        assert metrics["val/num_skipped"] == before.num_skipped == 0
        assert count_of(before) == own.num_updates
        copy = jax.tree.map(jnp.copy, before)
        after, metrics = own.step(before, (0, 1, 2, 3))
        assert_same(trained(after), trained(copy))
        assert metrics["val/num_skipped"] == after.num_skipped == own.num_updates
        assert after.step == 2
        further, metrics = own.step(after, ())
        assert metrics["val/num_skipped"] == 0
        assert further.num_skipped == own.num_updates
        assert count_of(further) == 2 * own.num_updates

    def test_leave_out_the_minibatches_that_they_are_of(self, name: str) -> None:
        own = learner_of(name)
        after, metrics = own.step(own.start(), (1,))
        left_out = 1 if name in SUPERVISED else 2
        assert metrics["val/num_skipped"] == after.num_skipped == left_out
        assert count_of(after) == own.num_updates - left_out
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(numbers(after)))


@pytest.mark.parametrize("name", SAMPLING)
class TestScoresThatAreMissing:
    def test_leave_everything_as_it_was_where_there_is_none(self, name: str) -> None:
        own = learner_of(name)
        before, metrics = own.step(own.start(), ())
        rows = N * (1 if name == "remax" else own.group_size)
        assert (metrics["val/num_scored"], metrics["val/num_unscored"]) == (rows, 0)
        copy = jax.tree.map(jnp.copy, before)
        after, metrics = own.step(before, (), (0, 1, 2, 3))
        assert_same(replace(after, step=1), replace(copy, step=1))
        assert (metrics["val/num_scored"], metrics["val/num_unscored"]) == (0, rows)
        assert all(np.isfinite(x) for x in metrics.values())

    def test_leave_out_the_minibatches_of_nothing_else(self, name: str) -> None:
        own = learner_of(name)
        after, metrics = own.step(own.start(), (), (1,))
        assert count_of(after) == own.num_updates - 2
        assert after.num_skipped == 0
        assert metrics["val/num_unscored"] == (1 if name == "remax" else own.group_size)


def test_members_of_a_sweep_do_not_disturb_each_other() -> None:
    own = learner_of("sft")
    alone = own.step(own.start(), ())
    states = jax.tree.map(lambda *x: jnp.stack(x), own.start(), own.start())
    tokens = np.stack([pairs(marked).prompts for marked in ((), (1,))])
    mask = np.ones((N, T), bool)
    both = jax.vmap(sft.make_step(MODEL, OPTIMIZER), (0, 0, None, None))(states, tokens, mask, mask)
    first, second = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    assert_close(first, alone, atol=1e-5)
    assert_same(trained(second[0]), trained(own.start()))
    assert (first[0].num_skipped, second[0].num_skipped) == (0, 1)


def test_a_divergence_that_is_no_number_does_not_move_the_coefficient() -> None:
    own = learner_of("ppo")
    ref = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), REF)
    after, metrics = own.step(own.start(), (), ref=ref)
    assert np.isnan(metrics["objective/kl"])
    assert after.kl_coef == np.float32(0.1)
    assert metrics["val/num_skipped"] == own.num_updates
    assert_same(trained(after), trained(own.start()))
