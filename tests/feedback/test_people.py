"""Users on one shared model: as if each were alone, in one program."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, recurrent

from rlhfjax import models, rollout, sharding
from rlhfjax.algorithms import grpo, reward_model
from rlhfjax.feedback import people
from rlhfjax.models import lora
from rlhfjax.types import PreferenceBatch, Rollout

V, D, N, B = 6, 4, 3, 4
MODEL = recurrent(V, D)
HEAD = models.linear_head(D, stddev=0.5)
BASE = MODEL.init(jax.random.key(0))
# Decay and moments, so that an update without a gradient would be seen.
OPTIMIZER = optax.adamw(0.05, eps=1e-3, weight_decay=0.1)
COMBINE = partial(lora.merge, scale=1.0)
ADAPTERS = lora.init(jax.random.key(1), BASE, rank=2, pattern="mixing|embedding")


def pairs(seed: int, num: int = B) -> PreferenceBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (3, num, 3)).astype(np.int32)
    masks = np.arange(3) < rng.integers(1, 4, (3, num, 1))
    return PreferenceBatch(tokens[0], masks[0][:, ::-1], tokens[1], masks[1], tokens[2], masks[2])  # type: ignore[arg-type]


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def step(state: Any, batch: PreferenceBatch, base: Any) -> Any:
    """One update of a user: an adapter of the backbone and a head of their own."""
    scorer = models.scalar_model(lora.on(MODEL, base, combine=COMBINE), HEAD)
    return reward_model.make_step(scorer, OPTIMIZER)(state, batch)


SHARED = reward_model.init({"backbone": ADAPTERS, "head": HEAD.init(jax.random.key(2))}, OPTIMIZER)
LEARN = jax.jit(people.together(step))
ALL = jnp.ones(N, bool)


def train(own: Any, wanted: jax.Array = ALL, num_steps: int = 3) -> Any:
    states = people.start(SHARED, num_users=N)
    for _ in range(num_steps):
        states, _ = LEARN(states, wanted, own, BASE)
    return states


OWN = stacked(*(pairs(seed) for seed in range(N)))


class TestTogether:
    def test_equals_training_one_by_one(self) -> None:
        together = train(OWN)
        alone = jax.jit(step)
        for place in range(N):
            state = SHARED
            for _ in range(3):
                state, _ = alone(state, people.user(OWN, place), BASE)
            assert_close(people.user(together, place), state, atol=1e-5)
        params = together.params["backbone"]["mixing"]["b"]
        assert not np.allclose(params[0], params[1], atol=1e-3)

    def test_a_users_data_change_nobody_else(self) -> None:
        other = people.put(OWN, 1, pairs(9))
        before, after = train(OWN), train(other)
        for place in (0, 2):
            assert_same(people.user(before, place), people.user(after, place))
        moved = before.params["head"]["kernel"][1] - after.params["head"]["kernel"][1]
        assert np.abs(moved).max() > 1e-3

    def test_not_even_data_without_a_number(self) -> None:
        broken = replace(OWN, chosen_probs=jnp.ones((N, B)).at[1].set(jnp.nan))
        whole = replace(OWN, chosen_probs=jnp.ones((N, B)))
        states = train(broken)
        assert states.num_skipped.tolist() == [0, 3, 0]
        for place in (0, 2):
            assert_same(people.user(states, place), people.user(train(whole), place))

    def test_who_is_not_wanted_stays_to_the_bit(self) -> None:
        wanted = jnp.array([True, False, True])
        states = train(OWN, wanted)
        assert_same(people.user(states, 1), SHARED)
        assert_same(people.user(states, 2), people.user(train(OWN), 2))

    def test_more_pairs_of_one_user_are_room_for_others(self) -> None:
        names = ["ada", "bo", "cy"]
        feedback = {"cy": pairs(2, 4), "ada": pairs(0, 2)}
        batch = people.batches(feedback, names, num_pairs=4, vocab_size=V)
        wanted = batch.pairs.any(1)
        assert wanted.tolist() == [True, False, True]
        states = train(batch, jnp.asarray(wanted), num_steps=1)
        for name, own in feedback.items():
            alone, _ = jax.jit(step)(SHARED, own, BASE)
            assert_close(people.user(states, people.place_of(names, name)), alone, atol=1e-5)

    def test_a_newcomer_compiles_nothing(self) -> None:
        traced = []

        def counted(state: Any, own: Any, base: Any) -> Any:
            traced.append(1)
            return step(state, own, base)

        learn = sharding.Step(people.together(counted))
        put = jax.jit(people.put)
        states, _ = learn(people.start(SHARED, num_users=N), ALL, OWN, BASE)
        untouched = jax.tree.map(np.asarray, people.user(states, 0))
        for place in (2, 1):
            states = put(states, place, people.newcomer(SHARED, place))
            assert_same(people.user(states, place), SHARED)
        assert_same(people.user(states, 0), untouched)
        learn(states, ALL, OWN, BASE)
        assert len(traced) == 1 and put._cache_size() == 1  # type: ignore[attr-defined]

    @pytest.mark.parametrize("place", [3, 7, -1, np.int64(3), jnp.int32(-1)])
    def test_a_place_that_nobody_has_is_refused(self, place: Any) -> None:
        with pytest.raises(ValueError, match=f"place {place} of 3 users"):
            people.user(OWN, place)
        with pytest.raises(ValueError, match=f"place {place} of 3 users"):
            people.put(OWN, place, pairs(9))

    @pytest.mark.parametrize("place", ["ada", True, 1.0])
    def test_what_is_no_number_is_no_place(self, place: Any) -> None:
        for call in (people.user, partial(people.put, state=pairs(9))):
            with pytest.raises(ValueError, match=r"whole number.*place_of"):
                call(OWN, place)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"chosen": np.int32(1)}, r"at \.chosen the shape \(\), where \(4, 3\)"),
            ({"chosen": np.ones((B, 3), np.float32)}, r"at \.chosen the dtype float32"),
            ({"chosen_probs": np.ones(B)}, r"has in excess \.chosen_probs"),
        ],
        ids=["shape", "dtype", "structure"],
    )
    def test_a_state_unlike_the_others_is_refused(self, changed: Any, message: str) -> None:
        state = replace(pairs(9), **changed)
        with pytest.raises(ValueError, match=message):
            people.put(OWN, 1, state)
        keys = jax.random.split(jax.random.key(0), N)
        assert people.put(keys, np.int64(1), keys[2])[1] == keys[2]
        assert people.put({"x": jnp.zeros(N, int)}, 1, {"x": np.int64(3)})["x"][1] == 3

    def test_a_step_that_returns_another_shape_is_refused(self) -> None:
        shrink = people.together(lambda state, own: ({"x": state["x"].sum() + own}, {}))
        with pytest.raises(ValueError, match=r"step returns has at \['x'\] the shape \(\)"):
            jax.eval_shape(shrink, {"x": jnp.zeros((N, 2))}, ALL, jnp.zeros(N))

    def test_other_numbers_of_users_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"of 2 users, but the states .*\(3,\)"):
            LEARN(people.start(SHARED, num_users=N), jnp.ones(2, bool), OWN, BASE)
        with pytest.raises(ValueError, match=r"the data .*\(2,\)"):
            LEARN(people.start(SHARED, num_users=N), ALL, people.user(OWN, slice(2)), BASE)


class TestPolicies:
    def test_equal_policies_trained_one_by_one(self) -> None:
        config = grpo.Config(num_tokens=4, pad_token=0, end_token=2, group_size=4)
        prompts = jnp.array([[1], [3]])

        def improve(state: Any, liked: jax.Array, base: Any) -> Any:
            policy = lora.on(MODEL, base, combine=COMBINE)

            def score(liked: jax.Array, samples: Rollout) -> jax.Array:
                return (samples.responses == liked).sum(1).astype(jnp.float32)

            update = grpo.make_step(policy, score, OPTIMIZER, config)
            mask = jnp.ones(prompts.shape, bool)
            reference = lora.nothing(state.params)
            return update(state, prompts, mask, reference, liked, grpo.Hyperparameters())

        shared = grpo.init(ADAPTERS, OPTIMIZER, jax.random.key(3))
        together, alone = jax.jit(people.together(improve)), jax.jit(improve)
        liked = jnp.array([4, 5, 4])
        states = people.start(shared, num_users=N)
        # Each samples with a key of their own.
        assert len(np.unique(jax.random.key_data(states.key), axis=0)) == N
        for _ in range(2):
            states, metrics = together(states, ALL, liked, BASE)
        for place in range(N):
            state = people.newcomer(shared, place)
            for _ in range(2):
                state, own = alone(state, liked[place], BASE)
            assert_close(people.user(states, place), state, atol=1e-4)
            assert metrics["objective/scores"][place] == own["objective/scores"]

    def test_users_whose_responses_end_early_wait_for_the_others(self) -> None:
        """A loop that every user may end by themselves would select whole caches in every round."""

        def write(key: jax.Array) -> Rollout:
            prompts = jnp.ones((2, 1), jnp.int32)
            lengths = {"num_tokens": 8, "pad_token": 0, "end_token": (2, 3, 4)}
            return rollout.generate(MODEL, BASE, prompts, prompts == 1, key, **lengths)

        keys = jax.random.split(jax.random.key(0), N)
        together = jax.jit(jax.vmap(write))(keys)
        lengths = together.response_mask.sum(2).max(1)
        assert lengths.min() < lengths.max()
        for place, key in enumerate(keys):
            alone = jax.jit(write)(key)
            assert_same(people.user(together, place).tokens, alone.tokens)
            assert_close(people.user(together, place), alone, atol=1e-6)
        equations = jax.make_jaxpr(jax.vmap(write))(keys).eqns
        (ends,) = (x.params["cond_jaxpr"] for x in equations if x.primitive.name == "while")
        # One condition for all, not one for each.
        assert [x.shape for x in ends.out_avals] == [()]


class TestVectors:
    def shared(self) -> dict[str, Any]:
        directions = jax.random.normal(jax.random.key(4), (D, 2))
        head = HEAD.init(jax.random.key(5)) | {"directions": directions}
        return {"backbone": BASE, "head": head}

    def test_equal_an_explicit_head_of_each_user(self) -> None:
        shared, batch = self.shared(), pairs(0)
        scorer = models.scalar_model(MODEL, HEAD)
        vectors = jax.random.normal(jax.random.key(6), (N, 2))
        tokens, mask = batch.sequences
        own = people.embedded(scorer, shared)
        told = jax.vmap(lambda e: own.values(e, tokens, mask, first=2))(vectors)
        w, u, b = (np.asarray(shared["head"][x]) for x in ("kernel", "directions", "bias"))
        for vector, values in zip(np.asarray(vectors), told, strict=True):
            explicit = {"backbone": BASE, "head": {"kernel": w + u @ vector, "bias": b}}
            expected = scorer.values(explicit, tokens, mask, first=2)
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)

    def test_begin_as_the_shared_head(self) -> None:
        shared, batch = self.shared(), pairs(0)
        scorer = models.scalar_model(MODEL, HEAD)
        own = people.embedded(scorer, shared)
        assert_same(
            own.values(own.init(jax.random.key(0)), *batch.sequences),
            scorer.values(shared, *batch.sequences),
        )

    def test_of_another_size_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            people.head_of(self.shared()["head"], jnp.zeros(3))

    def test_of_a_policy_are_added_to_a_table(self) -> None:
        table = bigram(V)
        base, vector = table.init(jax.random.key(0)), jnp.arange(6.0)
        own = lora.on(table, base, combine=partial(people.added, table="table"))
        tokens = jnp.array([[1, 4]])
        hidden = own.hidden(vector, tokens, tokens > 0)
        np.testing.assert_allclose(hidden, (base["table"] + vector)[tokens])
        with pytest.raises(ValueError, match="no table 'rows'"):
            people.added(base, vector, table="rows")


class TestFeedback:
    @pytest.mark.parametrize(
        ("feedback", "message"),
        [
            ({}, "none of the 2 users"),
            ({"eve": pairs(0)}, "nobody is called 'eve' among ada, bo: name a free place"),
            ({"bo": pairs(0, 5)}, "user 'bo' has 5 pairs, and there is room for 4"),
            (
                {"ada": pairs(0), "bo": jax.tree.map(lambda x: x[:, :2], pairs(0))},
                "user 'bo': the columns",
            ),
            (
                {"bo": replace(pairs(0), chosen=np.full((B, 3), V))},
                "user 'bo': chosen of pair 0 has token 6 at position 0",
            ),
            (
                {"bo": replace(pairs(0), chosen=np.ones((B, 3), np.float32))},
                "user 'bo': chosen has to be integers, and is float32",
            ),
            (
                {"bo": replace(pairs(0), chosen_mask=np.ones((B, 3), int))},
                "user 'bo': chosen_mask has to be bool, and is int",
            ),
            (
                {"bo": replace(pairs(0), rejected=np.ones((B, 2), int))},
                r"user 'bo': rejected has the shape \(4, 2\), but .* has to be \(4, 3\)",
            ),
            (
                {"bo": replace(pairs(0), prompt_mask=np.ones((B, 2), bool))},
                r"user 'bo': prompt_mask has the shape \(4, 2\), but .* has to be \(4, 3\)",
            ),
            ({"bo": people.user(pairs(0), 0)}, r"user 'bo': chosen .* \[B, T\] .* of one pair too"),
            ({"bo": Rollout(*[np.ones((1, 1))] * 4)}, "user 'bo': .* not a Rollout"),
            (
                {"bo": replace(pairs(0), chosen_probs=np.array([1.0, 0.0, np.nan, 1.0]))},
                "user 'bo': chosen_probs of pair 2 is nan",
            ),
            (
                {"ada": replace(pairs(0), chosen_probs=np.ones(B)), "bo": pairs(0)},
                "user 'bo' has no chosen_probs, and those before have: give them to all",
            ),
            (
                {"ada": pairs(0), "bo": replace(pairs(0), chosen_probs=np.ones(B))},
                "user 'bo' has chosen_probs, and those before have not: give them to all",
            ),
        ],
        ids=[
            "nothing",
            "unknown",
            "too many",
            "other lengths",
            "token",
            "no integers",
            "no bool",
            "shorter responses",
            "narrower mask",
            "one pair",
            "rollout",
            "probability",
            "only one is certain",
            "only one is not certain",
        ],
    )
    def test_what_is_wrong_names_the_user(self, feedback: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            people.batches(feedback, ["ada", "bo"], num_pairs=4, vocab_size=V)

    def test_tokens_under_the_mask_do_not_matter(self) -> None:
        own = pairs(0)
        columns = {
            name: np.where(getattr(own, mask), getattr(own, name), -1)
            for name, mask in people.MASKS.items()
        }
        batch = people.batches(
            {"bo": replace(own, **columns)}, ["ada", "bo"], num_pairs=B, vocab_size=V
        )
        for name, mask in people.MASKS.items():
            real = getattr(own, mask)
            assert not real.all()
            np.testing.assert_array_equal(getattr(batch, name)[1][real], getattr(own, name)[real])
            # A model looks up padding too.
            assert (getattr(batch, name)[1][~real] == 0).all()

    def test_columns_have_the_dtypes_of_a_batch_whoever_comes_first(self) -> None:
        small = replace(pairs(0), chosen_probs=np.ones(B, int))
        small = replace(small, **{x: getattr(small, x).astype(np.uint16) for x in people.MASKS})
        probs, tokens = np.array([0.9, 0.6, 0.3, 1.0]), np.full((B, 3), 70_000)
        feedback = {"ada": small, "bo": replace(pairs(0), chosen=tokens, chosen_probs=probs)}
        batch = people.batches(feedback, ["ada", "bo"], num_pairs=B, vocab_size=70_001)
        np.testing.assert_array_equal(batch.chosen_probs, [np.ones(B), np.float32(probs)])
        assert (batch.chosen[1][pairs(0).chosen_mask] == 70_000).all()
        kinds = {x.dtype for x in jax.tree.leaves(batch)}
        assert kinds == {np.dtype(x) for x in (np.int32, bool, np.float32)}

    def test_two_users_of_one_name_are_refused(self) -> None:
        with pytest.raises(ValueError, match="'bo' has 2 places"):
            people.batches({"bo": pairs(0)}, ["ada", "bo", "bo"], num_pairs=B, vocab_size=V)
        with pytest.raises(ValueError, match="'bo' has 2 places"):
            people.place_of(["bo", "bo"], "bo")

    def test_what_a_user_prefers_is_chosen(self) -> None:
        def written(token: int) -> Rollout:
            tokens = jnp.array([[1, token, 2], [1, token + 1, 0]])
            mask = jnp.array([[True, True], [True, False]])
            whole = jnp.concatenate([jnp.ones((2, 1), bool), mask], 1)
            return Rollout(tokens, whole, mask, jnp.zeros((2, 2)))

        batch = people.compared(written(3), written(4), jnp.array([True, False]))
        assert batch.chosen.tolist() == [[3, 2], [5, 0]]
        assert batch.rejected.tolist() == [[4, 2], [4, 0]]
        assert batch.chosen_mask.tolist() == batch.rejected_mask.tolist() == [[1, 1], [1, 0]]
        assert batch.prompts.tolist() == [[1], [1]] and batch.prompt_mask.all()
        assert batch.chosen_probs is None
        with pytest.raises(AssertionError):
            people.compared(written(3), written(4), jnp.array([1, 0]))

    def test_rounds_are_remembered_and_recalled(self) -> None:
        store = people.no_pairs(pairs(0), num_pairs=6)
        assert not store.pairs.any()
        empty = people.recall(jax.random.key(0), store, num_pairs=3)
        assert not empty.pairs.any()
        store = people.remember(store, pairs(0, 2), 0)
        store = people.remember(store, pairs(1, 2), 2)
        assert store.pairs.tolist() == [True] * 4 + [False] * 2
        np.testing.assert_array_equal(store.chosen[:2], pairs(0, 2).chosen)
        np.testing.assert_array_equal(store.chosen[2:4], pairs(1, 2).chosen)
        drawn = people.recall(jax.random.key(0), store, num_pairs=200)
        assert drawn.pairs.all()
        rows, counts = np.unique(np.asarray(drawn.chosen), axis=0, return_counts=True)
        assert len(rows) == 4 and counts.min() > 25
        # What has no room overwrites nothing.
        full = people.remember(store, pairs(2, 4), 4)
        np.testing.assert_array_equal(full.chosen[:4], store.chosen[:4])
        np.testing.assert_array_equal(full.chosen[4:], pairs(2, 4).chosen[:2])
        early = people.remember(store, pairs(2, 4), -1)
        np.testing.assert_array_equal(early.chosen[:3], pairs(2, 4).chosen[1:])
        np.testing.assert_array_equal(early.chosen[3:], store.chosen[3:])
        with pytest.raises(ValueError, match=r"at \.chosen the shape \(1, 1\), where \(1, 3\)"):
            people.remember(store, replace(pairs(2, 1), chosen=np.ones((1, 1), np.int32)), 0)

    @pytest.mark.filterwarnings("error")
    def test_tokens_may_be_wide_integers(self) -> None:
        wide = replace(pairs(0), chosen=np.asarray(pairs(0).chosen, np.int64))
        store = people.remember(people.no_pairs(wide, num_pairs=B), wide, 0)
        assert store.chosen.dtype == jnp.int32
        np.testing.assert_array_equal(store.chosen, wide.chosen)
