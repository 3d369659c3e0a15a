"""Algorithms without a critic: the program against its parts, and what none of them may read."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, left_padded, numbers, recurrent

from rlhfjax.algorithms import (
    best_of_n,
    cispo,
    critic_free,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    iteration,
    online_dpo,
    reinforce,
    reinforce_plus_plus,
    rejection_sampling,
    remax,
    rloo,
)
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import Rollout

V, N, P, T, PAD, END = 7, 4, 4, 5, 0, 2
PROMPTS, MASK = left_padded(np.random.default_rng(0), [4, 1, 3, 2], P, 3, V)
MODEL = bigram(V)
# Ends often enough for responses of every length.
PARAMS, REF = (
    {"table": MODEL.init(jax.random.key(seed))["table"].at[:, END].add(1.0)} for seed in (0, 1)
)
WEIGHT = jnp.float32(1.0)
# A large epsilon, so that Adam does not turn rounding of tiny gradients into steps.
OPTIMIZER = optax.adam(1e-2, eps=1e-3)
SGD = optax.sgd(0.1)

RATIOS = {"policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "val/ratio_var"}
TOKEN_RATIOS = RATIOS | {"dual_clip_fraction"}
SHARED = {
    *("objective/" + name for name in ("kl", "entropy", "scores", "non_score_reward")),
    *("objective/rlhf_reward", "objective/kl_coef", "loss/policy_avg", "policy/entropy_avg"),
    *("val/num_scored", "val/num_unscored", "val/num_skipped", "val/first_ratio_error"),
}
OF_PAIRS = {
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
}


class Algorithm(NamedTuple):
    """An algorithm, the size of its groups, and the metrics that not all have."""

    module: ModuleType
    group_size: int
    names: set[str]

    @property
    def config(self) -> critic_free.Config:
        own = self.module in (remax, online_dpo)
        sizes = {} if own else {"group_size": self.group_size}
        return self.module.Config(T, PAD, END, num_epochs=2, num_minibatches=2, **sizes)

    @property
    def hyper(self) -> Any:
        numbers = self.module.Hyperparameters(temperature=0.8)
        return numbers if self.module is rejection_sampling else replace(numbers, kl_coef=0.3)


ALGORITHMS = {
    "reinforce": Algorithm(reinforce, 1, set()),
    "reinforce_plus_plus": Algorithm(reinforce_plus_plus, 2, TOKEN_RATIOS),
    "rloo": Algorithm(rloo, 4, RATIOS),
    "remax": Algorithm(remax, 2, set()),
    "grpo": Algorithm(grpo, 4, TOKEN_RATIOS | {"kl"}),
    "dr_grpo": Algorithm(dr_grpo, 4, TOKEN_RATIOS | {"kl"}),
    "dapo": Algorithm(dapo, 4, TOKEN_RATIOS | {"kl"}),
    "gspo": Algorithm(gspo, 4, RATIOS | {"kl"}),
    "cispo": Algorithm(cispo, 4, RATIOS | {"kl"}),
    "online_dpo": Algorithm(online_dpo, 2, OF_PAIRS),
    "rejection_sampling": Algorithm(rejection_sampling, 4, set()),
}
COMPARING = [name for name, own in ALGORITHMS.items() if own.group_size == 4]
COMPARING.remove("rejection_sampling")
TRACES: list[int] = []


def sum_of_tokens(weight: Any, samples: Rollout) -> jax.Array:
    TRACES.append(1)
    return weight * (samples.responses * samples.response_mask).sum(1)


@cache
def step_of(name: str) -> Callable[..., Any]:
    own = ALGORITHMS[name]
    return own.module.make_step(MODEL, sum_of_tokens, OPTIMIZER, own.config)


@cache
def halves_of(name: str, optimizer: Any = OPTIMIZER, **changes: Any) -> Any:
    own = ALGORITHMS[name]
    return own.module.make_halves(MODEL, optimizer, replace(own.config, **changes))


def start(name: str, seed: int = 0, optimizer: Any = OPTIMIZER) -> iteration.State:
    return ALGORITHMS[name].module.init(PARAMS, optimizer, jax.random.key(seed))


def advance(name: str, state: iteration.State, **changes: Any) -> Any:
    hyper = replace(ALGORITHMS[name].hyper, **changes)
    return step_of(name)(state, PROMPTS, MASK, REF, WEIGHT, hyper)


@cache
def samples_of(name: str) -> Rollout:
    sample, _ = halves_of(name)
    return sample(start(name), PROMPTS, MASK, ALGORITHMS[name].hyper)


def learn(name: str, samples: Rollout, scores: Any) -> Any:
    _, learn = halves_of(name)
    return learn(start(name), samples, scores, REF, ALGORITHMS[name].hyper)


def learn_once(name: str, samples: Rollout, scores: Any) -> Any:
    """A single update, by gradient descent."""
    _, learn = halves_of(name, SGD, num_epochs=1, num_minibatches=1)
    return learn(start(name, optimizer=SGD), samples, scores, REF, ALGORITHMS[name].hyper)


def with_gap(name: str, missing: float = np.nan) -> np.ndarray:
    """Scores that differ, but for the third sample, which has none."""
    scores = np.random.default_rng(1).normal(size=len(samples_of(name).tokens)).astype(np.float32)
    scores[2] = missing
    return scores


@pytest.fixture(params=ALGORITHMS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def in_python(samples: Rollout) -> np.ndarray:
    rows = zip(samples.responses.tolist(), samples.response_mask.tolist(), strict=True)
    return np.float32(
        [sum(token for token, real in zip(*row, strict=True) if real) for row in rows]
    )


# Those whose programs differ; that of every algorithm is run in test_sweeps.py.
PROGRAMS = ["reinforce", "remax", "grpo", "dapo"]


class TestProgram:
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_an_iteration_is_two_halves_around_a_reward_in_python(self, name: str) -> None:
        own = ALGORITHMS[name]
        state, metrics = advance(name, start(name))
        samples = samples_of(name)
        scores = in_python(samples)
        assert len(set(scores)) > 2
        if name == "dapo":
            # The program also drops the groups that do not differ, see test_dapo.py.
            found = dapo.collect(dapo.nothing_of(samples), samples, scores, group_size=4)
            samples, scores = found.rollout, found.scores
            metrics = {
                x: metrics[x] for x in metrics if x not in {"val/num_groups", "val/num_rounds"}
            }
            metrics["val/num_scored"] = jnp.isfinite(scores).sum()
        assert_close((state, metrics), learn(name, samples, scores), atol=1e-6)

        assert set(metrics) == SHARED | own.names
        assert metrics["val/first_ratio_error"] <= 1e-5
        assert state.step == 1
        assert_same(state.key, jax.random.key(0))
        assert_moved(state.params)

    @pytest.mark.parametrize("name", PROGRAMS)
    def test_it_is_traced_once_for_all_iterations_and_numbers(self, name: str) -> None:
        state, _ = advance(name, start(name))
        count = len(TRACES)
        for temperature in (0.9, 1.1):
            state, _ = advance(name, state, temperature=temperature)
        assert len(TRACES) == count > 0

    @pytest.mark.parametrize("name", PROGRAMS)
    def test_it_donates_its_state_but_not_the_parameters_it_started_from(self, name: str) -> None:
        state = start(name)
        advance(name, state)
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            advance(name, state)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))

    def test_iterations_and_seeds_sample_from_keys_of_their_own(self, name: str) -> None:
        sample, _ = halves_of(name)
        states = start(name), replace(start(name), step=jnp.int32(1)), start(name, seed=1)
        sampled = [sample(x, PROMPTS, MASK, ALGORITHMS[name].hyper).responses for x in states]
        assert (sampled[0] != sampled[1]).any()
        assert (sampled[0] != sampled[2]).any()

    def test_one_update_is_a_descent_of_the_loss_of_its_experience(self, name: str) -> None:
        own = ALGORITHMS[name]
        samples = samples_of(name)
        scores = with_gap(name)
        after, metrics = learn_once(name, samples, scores)
        assert set(metrics) == SHARED | own.names

        measure = partial(critic_free.experience, model=MODEL, group_size=own.group_size)

        def loss(params: Any, samples: Rollout, scores: Any) -> jax.Array:
            batch = own.module.estimate(measure(samples, scores, REF, own.hyper), own.hyper)
            rollout = batch.rollout
            now, _ = response_log_probs(
                MODEL, params, rollout.tokens, rollout.attention_mask, T, temperature=0.8
            )
            return own.module.loss(jnp.where(batch.mask, now, 0.0), batch, own.hyper)[0]

        value, grads = jax.jit(jax.value_and_grad(loss))(PARAMS, samples, scores)
        assert metrics["loss/policy_avg"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads), atol=1e-5)


def assert_moved(params: Any) -> None:
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, PARAMS)
    assert all(x > 1e-4 for x in jax.tree.leaves(moved))


def assert_finite(tree: Any) -> None:
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(numbers(tree)))


class TestSamplesWithoutAScore:
    @pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
    def test_are_ignored_to_the_last_bit(self, name: str, missing: float) -> None:
        samples, scores = samples_of(name), with_gap(name, missing)
        polluted = replace(
            samples,
            tokens=samples.tokens.at[2, P:].set(5),
            attention_mask=samples.attention_mask.at[2, P:].set(True),
            response_mask=samples.response_mask.at[2].set(True),
            log_probs=samples.log_probs.at[2].set(jnp.nan),
        )
        clean, metrics = learn(name, samples, scores)
        given = learn(name, polluted, scores)
        assert_same((clean, metrics), given)
        assert_finite((clean.params, metrics))
        assert_moved(clean.params)
        assert metrics["val/num_unscored"] == 1

    def test_may_be_all_of_them(self, name: str) -> None:
        samples = samples_of(name)
        nothing = np.full(len(samples.tokens), np.nan, np.float32)
        state, metrics = learn_once(name, samples, nothing)
        assert_same(state.params, PARAMS)
        assert_finite(metrics)
        # The greedy responses of ReMax are not the policy's samples.
        assert metrics["val/num_unscored"] == (N if name == "remax" else len(nothing))


class TestPadding:
    @pytest.mark.parametrize("name", ["rloo", "remax"])
    def test_of_prompts_is_not_read(self, name: str) -> None:
        own = ALGORITHMS[name]
        model = recurrent(V, 8)
        params = model.init(jax.random.key(0))
        step = own.module.make_step(model, sum_of_tokens, OPTIMIZER, own.config)
        given, clean = (
            step(
                own.module.init(params, OPTIMIZER, jax.random.key(0)),
                prompts,
                MASK,
                params,
                WEIGHT,
                own.hyper,
            )
            for prompts in (np.where(MASK, PROMPTS, 6), PROMPTS)
        )
        assert_same(given, clean)
        assert clean[1]["val/first_ratio_error"] <= 1e-5

    def test_is_not_read_by_learning(self, name: str) -> None:
        samples = samples_of(name)
        scores = np.nan_to_num(with_gap(name))
        assert not samples.response_mask.all()
        assert (samples.responses[~samples.response_mask] == PAD).all()
        polluted = replace(
            samples,
            tokens=jnp.where(samples.attention_mask, samples.tokens, 6),
            log_probs=jnp.where(samples.response_mask, samples.log_probs, jnp.nan),
        )
        clean, metrics = learn(name, samples, scores)
        assert_same((clean, metrics), learn(name, polluted, scores))
        assert_finite((clean.params, metrics))


class TestMinibatches:
    @pytest.mark.parametrize("parts", [3, 8])
    def test_that_do_not_divide_the_prompts_are_refused_with_both_numbers(
        self, name: str, parts: int
    ) -> None:
        with pytest.raises(ValueError, match=rf"\b{N} rows .* num_minibatches={parts}\b"):
            _, learn = halves_of(name, num_minibatches=parts)
            learn(start(name), samples_of(name), with_gap(name), REF, ALGORITHMS[name].hyper)

    # What of a group is learned from, in which order, when later samples score higher.
    @pytest.mark.parametrize(
        ("name", "kept"),
        {
            "reinforce": [0],
            "remax": [0],
            "rloo": [0, 1, 2, 3],
            "online_dpo": [1, 0],
            "rejection_sampling": [3],
        }.items(),
    )
    def test_are_made_of_whole_groups_each_once_an_epoch(self, name: str, kept: list[int]) -> None:
        own = ALGORITHMS[name]
        seen: list[np.ndarray] = []

        def loss(log_probs: jax.Array, batch: critic_free.Experience, hyper: Any) -> Any:
            jax.debug.callback(lambda x: seen.append(np.array(x)), batch.scores, ordered=True)
            return log_probs.sum(), {}

        parts = {"estimate": own.module.estimate, "loss": loss, "model": MODEL}
        learn = partial(critic_free.learn, **parts, optimizer=OPTIMIZER, config=own.config)
        samples = samples_of(name)
        # The score is the number of the sample, and tells its group.
        scores = np.arange(len(samples.tokens), dtype=np.float32)
        jax.jit(learn)(start(name), samples, scores, REF, own.hyper)
        jax.effects_barrier()
        assert len(seen) == 4
        groups = np.stack(seen).reshape(2, N, -1)
        first = own.group_size * (groups[..., :1] // own.group_size)
        np.testing.assert_array_equal(groups, first + np.array(kept))
        every = own.group_size * np.arange(N)
        np.testing.assert_array_equal(np.sort(first[..., 0]), [every, every])


class TestGroups:
    @pytest.mark.parametrize("name", COMPARING)
    @pytest.mark.parametrize("size", [1, 0])
    def test_that_are_compared_need_two_responses(self, name: str, size: int) -> None:
        with pytest.raises(ValueError, match=f"group_size={size}: .* at least 2"):
            ALGORITHMS[name].module.Config(T, PAD, group_size=size)

    @pytest.mark.parametrize("algorithm", [reinforce, best_of_n, rejection_sampling])
    def test_of_the_others_may_have_one_response_but_not_none(self, algorithm: ModuleType) -> None:
        assert algorithm.Config(T, PAD, group_size=1).group_size == 1
        with pytest.raises(ValueError, match=r"group_size=0: .* at least 1"):
            algorithm.Config(T, PAD, group_size=0)

    @pytest.mark.parametrize("name", ["remax", "online_dpo"])
    def test_that_are_always_pairs_have_no_size(self, name: str) -> None:
        with pytest.raises(TypeError, match="group_size"):
            ALGORITHMS[name].module.Config(T, PAD, group_size=2)
        assert ALGORITHMS[name].module.Config(T, PAD).group_size == 2

    def test_are_responses_to_one_prompt_side_by_side(self, name: str) -> None:
        size = ALGORITHMS[name].group_size
        assert_same(samples_of(name).prompts, np.repeat(PROMPTS, size, axis=0))


def test_the_metrics_of_the_objective_are_means_over_responses() -> None:
    samples, scores = samples_of("rloo"), with_gap("rloo")
    _, metrics = learn("rloo", samples, scores)
    mask = np.array(samples.response_mask)
    ref, _ = response_log_probs(
        MODEL, REF, samples.tokens, samples.attention_mask, T, temperature=0.8
    )
    rows = [row for row in range(len(scores)) if row != 2]
    now = [np.array(samples.log_probs, np.float64)[row][mask[row]] for row in rows]
    then = [np.array(ref, np.float64)[row][mask[row]] for row in rows]
    kl = np.mean([(a - b).sum() for a, b in zip(now, then, strict=True)])
    expected = {
        "objective/kl": kl,
        "objective/entropy": -np.mean([a.sum() for a in now]),
        "objective/scores": scores[rows].mean(),
        "objective/non_score_reward": -0.3 * kl,
        "objective/rlhf_reward": scores[rows].mean() - 0.3 * kl,
        "objective/kl_coef": 0.3,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


class TestReMax:
    def test_even_rows_are_sampled_and_odd_rows_greedy(self) -> None:
        samples = samples_of("remax")
        table = np.asarray(PARAMS["table"])
        for row in range(1, 2 * N, 2):
            token = PROMPTS[row // 2, -1]
            for found, real in zip(samples.responses[row], samples.response_mask[row], strict=True):
                if real:
                    token = table[token].argmax()
                    assert found == token
        # A sample is what other algorithms sample in that row, and not the greedy response.
        plain = critic_free.Config(T, PAD, END, group_size=2)
        hyper = ALGORITHMS["remax"].hyper
        sample = jax.jit(partial(critic_free.sample, model=MODEL, config=plain))
        others = sample(start("remax"), PROMPTS, MASK, hyper)
        assert_same(samples.responses[::2], others.responses[::2])
        assert (samples.responses[::2] != samples.responses[1::2]).any(1).all()
