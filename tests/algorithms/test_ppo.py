"""PPO: the phases against NumPy, the program against its phases, and what may be done to it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import (
    assert_close,
    assert_same,
    bigram,
    chosen,
    left_padded,
    log_softmax,
    recurrent,
)

from rlhfjax import models
from rlhfjax.algorithms import ppo
from rlhfjax.types import Params, Rollout

V, WIDTH, B, P, T, PAD, END = 11, 8, 8, 4, 6, 0, 2
PROMPTS, MASK = left_padded(np.random.default_rng(0), [4, 1, 3, 2, 4, 4, 2, 3], P, 3, V)
CONFIG = ppo.Config(T, PAD, END, num_epochs=2, num_minibatches=2)
ONE_UPDATE = replace(CONFIG, num_epochs=1, num_minibatches=1)
HYPER = ppo.Hyperparameters(
    temperature=0.8, gamma=0.97, gae_lambda=0.9, entropy_coef=0.01, kl_horizon=100.0
)
# A large epsilon, so that Adam does not turn rounding of tiny gradients into steps.
OPTIMIZER = optax.adam(1e-2, eps=1e-3)
WEIGHT = jnp.float32(1.0)
EXPERIENCE = jax.jit(ppo.experience, static_argnames="model")
GRADIENT = jax.jit(jax.grad(ppo.loss, has_aux=True), static_argnames="model")
HALVES = cache(ppo.make_halves)


def count_threes(weight: Params, samples: Rollout) -> jax.Array:
    return weight * ((samples.responses == 3) & samples.response_mask).sum(1)


def actor_critic(kind: str) -> models.ActorCritic:
    """Neither of them Flax: two tables, or one recurrent trunk."""
    if kind == "separate":
        head = models.linear_head(V, stddev=0.5)
        return models.separate_trunks(bigram(V), models.scalar_model(bigram(V), head))
    return models.shared_trunk(recurrent(V, WIDTH), models.linear_head(WIDTH, stddev=0.5))


class World(NamedTuple):
    """A model, where it starts, a reference that is another policy, and a compiled step."""

    model: models.ActorCritic
    params: Params
    ref: Params
    step: Callable[..., tuple[ppo.State, ppo.Metrics]]

    def start(self, seed: int = 0, optimizer: Any = OPTIMIZER) -> ppo.State:
        return ppo.init(self.params, optimizer, jax.random.key(seed), kl_coef=0.1)

    def advance(self, state: ppo.State, hyper: ppo.Hyperparameters = HYPER):
        return self.step(state, PROMPTS, MASK, self.ref, WEIGHT, hyper)

    def sample(self, state: ppo.State, config: ppo.Config = CONFIG) -> Rollout:
        return HALVES(self.model, OPTIMIZER, config)[0](state, PROMPTS, MASK, HYPER)

    def experience(self, samples: Rollout, scores: Any) -> tuple[ppo.Experience, ppo.Metrics]:
        beta = jnp.float32(0.1)
        return EXPERIENCE(self.params, samples, scores, self.ref, HYPER, beta, model=self.model)

    def learn(
        self,
        state: ppo.State,
        samples: Rollout,
        scores: Any,
        config: ppo.Config = CONFIG,
        hyper: ppo.Hyperparameters = HYPER,
        optimizer: Any = OPTIMIZER,
    ) -> tuple[ppo.State, ppo.Metrics]:
        learn = HALVES(self.model, optimizer, config)[1]
        return learn(state, samples, scores, self.ref, hyper)


@cache
def world_of(kind: str) -> World:
    model = actor_critic(kind)
    return World(
        model,
        model.init(jax.random.key(0)),
        model.policy.init(jax.random.key(1)),
        ppo.make_step(model, count_threes, OPTIMIZER, CONFIG),
    )


@pytest.fixture(scope="module", params=["separate", "shared"])
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


@pytest.fixture(scope="module")
def separate() -> World:
    return world_of("separate")


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def member(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


class TestPhases:
    def test_one_update_is_a_descent_of_the_loss_of_the_experience(self, separate: World) -> None:
        world, state = separate, separate.start()
        params, opt_state = jax.tree.map(jnp.copy, (state.params, state.opt_state))
        samples = world.sample(state)
        scores = count_threes(WEIGHT, samples)
        after, metrics = world.learn(state, samples, scores, ONE_UPDATE)

        data, objective = world.experience(samples, scores)
        grads, measured = GRADIENT(params, data, HYPER, model=world.model)
        updates, _ = OPTIMIZER.update(grads, opt_state, params)
        assert_close(after.params, optax.apply_updates(params, updates), atol=1e-5)
        measured["ppo/first_ratio_error"] = measured.pop("ratio_error")
        for name, value in (objective | measured).items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name

    def test_the_loss_is_the_weighted_sum_of_its_parts(self, separate: World) -> None:
        samples = separate.sample(separate.start())
        data, _ = separate.experience(samples, count_threes(WEIGHT, samples))
        hyper = replace(HYPER, value_coef=0.3, entropy_coef=0.2)
        total, parts = ppo.loss(separate.params, data, hyper, model=separate.model)
        expected = (
            parts["loss/policy_avg"]
            + 0.3 * parts["loss/value_avg"]
            - 0.2 * parts["policy/entropy_avg"]
        )
        assert total == pytest.approx(float(expected), rel=1e-6)

    def test_an_iteration_is_two_halves_around_a_reward_in_python(self, world: World) -> None:
        samples = world.sample(world.start())
        scores = np.array(
            [
                sum(token == 3 for token, real in zip(*row, strict=True) if real)
                for row in zip(
                    samples.responses.tolist(), samples.response_mask.tolist(), strict=True
                )
            ],
            np.float32,
        )
        assert scores.any()
        state, metrics = world.learn(world.start(), samples, scores)
        assert_close((state, metrics), world.advance(world.start()), atol=1e-6)
        assert state.step == 1
        assert_same(state.key, world.start().key)

    def test_iterations_sample_from_keys_of_their_own(self, separate: World) -> None:
        state = separate.start()
        now, later = (
            separate.sample(replace(state, step=jnp.int32(step))).responses for step in (0, 1)
        )
        assert (now != later).any()

    def test_the_same_state_gives_the_same_iteration_to_the_last_bit(self, world: World) -> None:
        assert_same(world.advance(world.start()), world.advance(world.start()))


def recording(num_updates: int) -> optax.GradientTransformation:
    """Keeps every gradient and moves nothing."""

    def init(params: Params):
        return jnp.int32(0), jax.tree.map(lambda p: jnp.zeros((num_updates, *p.shape)), params)

    def update(grads: Params, state: Any, params: Params = None):
        count, seen = state
        seen = jax.tree.map(lambda s, g: s.at[count].set(g), seen, grads)
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, seen)

    return optax.GradientTransformation(init, update)


def test_every_epoch_uses_every_sample_once_in_an_order_of_its_own(separate: World) -> None:
    # Without an end token all minibatches have as many tokens, and their means average exactly.
    config = replace(CONFIG, end_token=None, num_epochs=3, num_minibatches=4)
    optimizer = recording(12)
    state = separate.start(optimizer=optimizer)
    samples = separate.sample(state, config)
    scores = count_threes(WEIGHT, samples)
    after, _ = separate.learn(state, samples, scores, config, optimizer=optimizer)
    count, seen = after.opt_state
    assert count == 12

    data, _ = separate.experience(samples, scores)
    whole, _ = GRADIENT(separate.params, data, HYPER, model=separate.model)
    epochs = jax.tree.map(lambda s: s.reshape(3, 4, *s.shape[1:]), seen)
    for epoch in range(3):
        mean = jax.tree.map(lambda s, e=epoch: s[e].mean(0), epochs)
        assert_close(mean, whole, atol=1e-5)
    norms = np.sort(np.sqrt((epochs["policy"]["table"] ** 2).sum((-1, -2))), axis=1)
    assert len(np.unique(norms.round(4), axis=0)) == 3


def test_what_is_measured_is_what_numpy_says_of_the_rollout() -> None:
    world = world_of("separate")
    samples = world.sample(world.start())
    scores = np.random.default_rng(3).normal(size=B).astype(np.float32)
    after, metrics = world.learn(world.start(), samples, scores, ONE_UPDATE)

    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.response_mask)
    before, after_it = tokens[:, P - 1 : -1], tokens[:, P:]
    assert (~mask).sum() > 0
    table = np.asarray(world.params["policy"]["table"])
    every = log_softmax(table, temperature=0.8)
    log_probs = np.where(mask, chosen(every[before], after_it), 0)
    ref_log_probs = chosen(log_softmax(world.ref["table"], temperature=0.8)[before], after_it)
    kl = np.where(mask, log_probs - ref_log_probs, 0)
    value = jax.tree.map(lambda x: np.asarray(x, np.float64), world.params["value"])
    of_token = value["backbone"]["table"] @ value["head"]["kernel"] + value["head"]["bias"]
    values = of_token[before]
    advantages, returns = np.zeros((2, B, T))
    for row in range(B):
        following = following_value = 0.0
        for t in reversed(range(mask[row].sum())):
            reward = -0.1 * kl[row, t] + (scores[row] if t == mask[row].sum() - 1 else 0)
            delta = reward + 0.97 * following_value - values[row, t]
            following = delta + 0.97 * 0.9 * following
            following_value = values[row, t]
            advantages[row, t], returns[row, t] = following, following + values[row, t]

    expected = {
        "objective/kl": kl.sum(1).mean(),
        "objective/entropy": -log_probs.sum(1).mean(),
        "objective/non_score_reward": -0.1 * kl.sum(1).mean(),
        "objective/scores": scores.mean(),
        "objective/rlhf_reward": scores.mean() - 0.1 * kl.sum(1).mean(),
        "objective/kl_coef": 0.1,
        "policy/entropy_avg": -(np.exp(every) * every).sum(-1)[before][mask].mean(),
        "policy/approxkl_avg": 0.0,
        "policy/clipfrac_avg": 0.0,
        # Whitened advantages have mean 0, and every ratio is 1.
        "loss/policy_avg": 0.0,
        "loss/value_avg": 0.5 * ((values - returns)[mask] ** 2).mean(),
        "val/clipfrac_avg": 0.0,
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
        "val/num_eos_tokens": (after_it == END)[mask].sum(),
        "val/num_scored": B,
        "val/num_unscored": 0,
        "val/num_skipped": 0,
        "ppo/first_ratio_error": 0.0,
    }
    assert set(metrics) == set(expected)
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number, rel=1e-4, abs=1e-5), name

    data, _ = world.experience(samples, scores)
    real = advantages[mask]
    whitened = np.where(mask, (advantages - real.mean()) / real.std(), 0.0)
    np.testing.assert_allclose(data.advantages, whitened, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(data.returns, returns, rtol=1e-4, atol=1e-4)
    error = np.clip(expected["objective/kl"] / 6.0 - 1, -0.2, 0.2)
    assert after.kl_coef == pytest.approx(0.1 * (1 + error * B / 100), rel=1e-5)


class TestProgram:
    def test_scanned_over_iterations_it_equals_one_call_after_another(self) -> None:
        world = world_of("shared")

        @jax.jit
        def three(state: ppo.State) -> tuple[ppo.State, ppo.Metrics]:
            return jax.lax.scan(lambda s, _: world.advance(s), state, length=3)

        end, metrics = three(world.start())
        state, rows = world.start(), []
        for _ in range(3):
            state, row = world.advance(state)
            rows.append(row)
        assert state.step == 3
        assert_close((end, metrics), (state, stacked(*rows)), atol=1e-4)

    def test_vmapped_over_seeds_it_equals_a_run_of_each(self, separate: World) -> None:
        both = jax.vmap(separate.advance)(stacked(separate.start(0), separate.start(1)))
        for index in range(2):
            alone = separate.advance(separate.start(index))
            assert_close(member(both, index), alone, atol=1e-5)
        assert both[1]["objective/kl"][0] != both[1]["objective/kl"][1]

    def test_vmapped_over_hyper_parameters_it_equals_a_run_of_each(self, separate: World) -> None:
        pair = [
            replace(HYPER, temperature=0.7, clip_range=0.01, kl_target=3.0),
            replace(HYPER, temperature=1.2, clip_range=0.3, kl_target=30.0),
        ]
        states = stacked(separate.start(), separate.start())
        numbers_of_both = stacked(*(jax.tree.map(jnp.float32, hyper) for hyper in pair))
        both = jax.vmap(separate.advance)(states, numbers_of_both)
        for index, hyper in enumerate(pair):
            alone = separate.advance(separate.start(), hyper)
            assert_close(member(both, index), alone, atol=1e-5)
        # A small clip range is met by more ratios.
        clipped = both[1]["policy/clipfrac_avg"]
        assert clipped[0] > clipped[1]

    def test_vmapped_over_learning_rates_it_equals_a_run_of_each(self, separate: World) -> None:
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0, eps=1e-3)
        states = [separate.start(optimizer=optimizer) for _ in range(2)]
        for state, rate in zip(states, (0.0, 1e-2), strict=True):
            state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        step = ppo.make_step(separate.model, count_threes, optimizer, CONFIG)
        both, _ = jax.vmap(separate._replace(step=step).advance)(stacked(*states))
        assert_same(member(both.params, 0), separate.params)
        # 1e-2 is the rate of `OPTIMIZER`.
        plain, _ = separate.advance(separate.start())
        assert_close(member(both.params, 1), plain.params, atol=1e-5)

    def test_it_is_traced_once_for_all_iterations_and_numbers(self) -> None:
        traces = []

        def counting(weight: Params, samples: Rollout) -> jax.Array:
            traces.append(1)
            return count_threes(weight, samples)

        policy = bigram(V)
        model = models.shared_trunk(policy, models.linear_head(V, stddev=0.1))
        params = model.init(jax.random.key(0))
        world = World(
            model, params, params["policy"], ppo.make_step(model, counting, OPTIMIZER, CONFIG)
        )
        state = world.start()
        for temperature in (1.0, 0.9, 0.8):
            state, _ = world.advance(state, replace(HYPER, temperature=temperature))
        assert len(traces) == 1

    def test_it_donates_its_state_but_not_the_parameters_it_started_from(
        self, separate: World
    ) -> None:
        state = separate.start()
        separate.advance(state)
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            separate.advance(state)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(separate.params))


class TestBatchesThatDoNotDivide:
    @pytest.mark.parametrize("parts", [3, 16])
    def test_are_refused_with_both_numbers(self, separate: World, parts: int) -> None:
        step = ppo.make_step(
            separate.model, count_threes, OPTIMIZER, replace(CONFIG, num_minibatches=parts)
        )
        with pytest.raises(ValueError, match=f"{B} rows .* num_minibatches={parts}"):
            separate._replace(step=step).advance(separate.start())


class TestSamplesWithoutAScore:
    @pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
    def test_are_ignored_to_the_last_bit(self, world: World, missing: float) -> None:
        samples = world.sample(world.start())
        scores = np.arange(B, dtype=np.float32)
        scores[2] = missing
        polluted = replace(
            samples,
            tokens=samples.tokens.at[2, P:].set(9),
            attention_mask=samples.attention_mask.at[2, P:].set(True),
            response_mask=samples.response_mask.at[2].set(True),
            log_probs=samples.log_probs.at[2].set(jnp.nan),
            values=None if samples.values is None else samples.values.at[2].set(jnp.nan),
        )
        clean, metrics = world.learn(world.start(), samples, scores)
        given, same = world.learn(world.start(), polluted, scores)
        assert_same(clean, given)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((clean.params, metrics)))
        assert metrics["val/num_unscored"] == 1
        for name in metrics:
            assert metrics[name] == same[name], name
        assert metrics["objective/scores"] == pytest.approx(np.delete(np.arange(B), 2).mean())

    def test_are_left_out_as_if_they_had_not_been_drawn(self, separate: World) -> None:
        samples = separate.sample(separate.start())
        scores = np.arange(B, dtype=np.float32)
        scores[3::4] = np.nan
        kept = np.flatnonzero(np.isfinite(scores))
        with_gaps, _ = separate.learn(separate.start(), samples, scores, ONE_UPDATE)
        without = separate.learn(
            separate.start(), jax.tree.map(lambda x: x[kept], samples), scores[kept], ONE_UPDATE
        )
        assert_close(with_gaps.params, without[0].params, atol=1e-5)
        assert_close(with_gaps.kl_coef, without[0].kl_coef, atol=1e-7)
        assert with_gaps.kl_coef != separate.start().kl_coef
        assert_close(with_gaps.kl_coef, without[0].kl_coef, atol=1e-7)

    def test_may_be_all_of_them(self, separate: World) -> None:
        samples = separate.sample(separate.start())
        state, metrics = separate.learn(
            separate.start(),
            samples,
            np.full(B, np.nan, np.float32),
            hyper=replace(HYPER, entropy_coef=0.0),
        )
        assert_same(state.params, separate.params)
        assert metrics["val/num_unscored"] == B
        assert all(np.isfinite(x).all() for x in metrics.values())


@pytest.mark.parametrize("end", [END, (V - 1, END)])
def test_responses_of_nothing_but_an_end_token_are_learned_from(end: int | tuple[int, ...]) -> None:
    config = replace(CONFIG, end_token=end)
    table = np.zeros((V, V), np.float32)
    table[:, END] = 50.0
    policy = bigram(V)
    model = models.shared_trunk(policy, models.linear_head(V, stddev=0.01))
    params = {
        "policy": {"table": jnp.asarray(table)},
        "head": model.init(jax.random.key(0))["head"],
    }
    world = World(
        model, params, params["policy"], ppo.make_step(model, count_threes, OPTIMIZER, config)
    )
    state, metrics = world.advance(world.start())
    assert metrics["val/num_eos_tokens"] == B
    assert metrics["objective/scores"] == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, metrics)))


class TestCoefficient:
    @pytest.mark.parametrize(("target", "error"), [(1e-3, 0.2), (1e3, -0.2)])
    def test_moves_by_its_bound_when_far_off(
        self, separate: World, target: float, error: float
    ) -> None:
        state, metrics = separate.advance(separate.start(), replace(HYPER, kl_target=target))
        assert state.kl_coef == pytest.approx(0.1 * (1 + error * B / 100), rel=1e-6)
        assert metrics["objective/kl_coef"] == np.float32(0.1)

    def test_stays_at_an_infinite_horizon(self, separate: World) -> None:
        state, _ = separate.advance(separate.start(), replace(HYPER, kl_horizon=np.inf))
        assert state.kl_coef == np.float32(0.1)


def decoder_pair() -> models.ActorCritic:
    config = models.DecoderConfig(V, P + T, width=16, num_layers=1, num_heads=2)
    return models.shared_trunk(models.decoder(config), models.linear_head(16, stddev=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "not Flax"])
def test_it_learns_to_say_threes(kind: str) -> None:
    model = decoder_pair() if kind == "decoder" else actor_critic("shared")
    optimizer = optax.adam(2e-2)
    params = jax.jit(model.init)(jax.random.key(0))
    step = ppo.make_step(model, count_threes, optimizer, CONFIG)
    prompts, mask = (jnp.concatenate([x] * 4) for x in (PROMPTS, MASK))
    hyper = ppo.Hyperparameters(kl_horizon=np.inf)

    @jax.jit
    def run(state: ppo.State) -> tuple[ppo.State, ppo.Metrics]:
        def iterate(state: ppo.State, _: None) -> tuple[ppo.State, ppo.Metrics]:
            return step(state, prompts, mask, params["policy"], WEIGHT, hyper)

        return jax.lax.scan(iterate, state, length=30)

    _, metrics = run(ppo.init(params, optimizer, jax.random.key(0), kl_coef=0.01))
    scores = metrics["objective/scores"]
    assert scores[0] < 1.5
    assert scores[-1] > 4.5
    assert (metrics["ppo/first_ratio_error"] <= 1e-4).all()
    assert (metrics["policy/approxkl_avg"][:5] > 0).all()


def test_a_penalty_holds_the_policy_near_the_reference(separate: World) -> None:
    params, hyper = separate.params, replace(HYPER, kl_horizon=np.inf)

    def kl_after(kl_coef: float) -> float:
        state = ppo.init(params, OPTIMIZER, jax.random.key(0), kl_coef=kl_coef)
        for _ in range(20):
            state, metrics = separate.step(state, PROMPTS, MASK, params["policy"], WEIGHT, hyper)
        return float(metrics["objective/kl"])

    assert kl_after(10.0) < 0.5 * kl_after(0.0)
