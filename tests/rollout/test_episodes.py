"""Episodes: how they are laid out, what is in them, and that they are rollouts like any other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import decoded
from small_models import assert_close, assert_same, bigram, recurrent, scattered

from rlhfjax import advantages, masked, models, rollout, sampling
from rlhfjax.algorithms import critic_free, grpo, iteration, ppo
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, Rollout

V, P, T, OBS, K, B = 11, 4, 3, 3, 3, 12
PAD, END = 0, 2
LENGTH = K * T + (K - 1) * OBS
ENDLESS, SILENT, STRANGE, STRANGE_PROMPT = 1, 2, 3, 4
NO_FAULT = 0, 0
SETTINGS: Any = {"num_turns": K, "num_tokens": T, "pad_token": PAD, "end_token": END}
KEY, RESETS = jax.random.key(7), jax.random.split(jax.random.key(5), B)
CONFIG = models.DecoderConfig(V, P + LENGTH, width=16, num_layers=1, num_heads=2)
MODELS = {
    "learned positions": models.decoder(CONFIG),
    "rotary": models.decoder(
        replace(CONFIG, num_layers=2, rotary_base=1e4, rms_norm=True, windows=(5, None))
    ),
    "not Flax": recurrent(V, 8),
}


def reset(key: jax.Array) -> tuple[Any, jax.Array]:
    """A number from 3 to 9, said one to four times."""
    number, times = jax.random.randint(key, (2,), jnp.array([3, 1]), jnp.array([10, 5]))
    return {"sum": number, "turn": jnp.int32(0)}, jnp.where(jnp.arange(P) < times, number, -1)


def step(state: Any, tokens: jax.Array, fault: Any = NO_FAULT) -> tuple[Any, ...]:
    """Says what all tokens so far add up to, in one to three tokens; done where 3 divides it."""
    total = state["sum"] + jnp.where(tokens >= 0, tokens, 0).sum()
    said = jnp.where(jnp.arange(OBS) <= total % OBS, 3 + (total + jnp.arange(OBS)) % 7, -1)[::-1]
    after = {"sum": total, "turn": state["turn"] + 1}
    kind, token = fault
    said = jnp.where(kind == SILENT, -1, said)
    said = jnp.where((kind == STRANGE) & (state["turn"] == 1), said.at[0].set(token), said)
    done = (total % 3 == 0) & (kind != ENDLESS)
    return after, said, (total % 5).astype(jnp.float32), done


ENVIRONMENT = rollout.Environment(reset, step)


class InPython:
    """The same, in Python."""

    def __init__(self, prompts: Any) -> None:
        self.prompts, self.asked = prompts, []

    def reset(self, seeds: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        prompts = [[int(x) for x in self.prompts[seed] if x >= 0] for seed in seeds]
        return [prompt[0] for prompt in prompts], prompts

    def step(self, states: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[list[Any], ...]:
        self.asked.append(len(states))
        totals = [state + sum(turn) for state, turn in zip(states, tokens, strict=True)]
        said = [[3 + (total + i) % 7 for i in range(total % OBS + 1)][::-1] for total in totals]
        return totals, said, [float(x % 5) for x in totals], [x % 3 == 0 for x in totals]


def compiled(model: LanguageModel, environment: Any = ENVIRONMENT, **settings: Any) -> Any:
    return jax.jit(
        lambda params, resets, key: rollout.act(
            model, params, environment, resets, key, **SETTINGS | settings
        )
    )


PARAMS = scattered(MODELS["not Flax"], seed=1)


@jax.jit
def act(
    params: Params, resets: jax.Array, key: jax.Array, fault: Any = NO_FAULT
) -> rollout.Episodes:
    """One program for an environment with faults and without."""

    def begin(key: jax.Array) -> tuple[Any, jax.Array]:
        state, prompt = reset(key)
        return state, jnp.where((fault[0] == STRANGE_PROMPT) & (prompt == 5), fault[1], prompt)

    environment = rollout.Environment(begin, partial(step, fault=fault))
    model = MODELS["not Flax"]
    return rollout.act(
        model, params, environment, resets, key, value_of=lambda hidden: hidden[:, 0], **SETTINGS
    )


@pytest.fixture(scope="module", params=MODELS)
def acted(request: pytest.FixtureRequest) -> tuple[LanguageModel, Params, Any, rollout.Episodes]:
    """Episodes of one, two and three turns, some of which end early and some do not."""
    model = MODELS[request.param]
    params, run = scattered(model, seed=1), act if request.param == "not Flax" else compiled(model)
    episodes = run(params, RESETS, KEY)
    assert set(np.asarray(episodes.turns.sum(1))) == {1, 2, 3}
    return model, params, run, episodes


class TestEpisodes:
    def test_they_are_what_a_loop_over_turns_says(self, acted: Any) -> None:
        episodes = acted[3]
        samples, rewards = episodes.rollout, np.asarray(episodes.rewards)
        responses, mask = np.asarray(samples.responses), np.asarray(samples.response_mask)
        real = np.asarray(samples.attention_mask)
        assert samples.tokens.shape == (B, P + LENGTH)
        first, prompts = jax.vmap(reset)(RESETS)
        for row in range(B):
            prompt = [int(x) for x in prompts[row] if x >= 0]
            total, at, over = int(first["sum"][row]), 0, False
            assert samples.prompts[row].tolist() == [PAD] * (P - len(prompt)) + prompt
            for k in range(K):
                here = slice(at, at + T)
                turn = responses[row, here][mask[row, here]].tolist()
                assert bool(episodes.turns[row, k]) == bool(turn) == (not over)
                assert responses[row, here].tolist() == turn + [PAD] * (T - len(turn))
                total += sum(turn)
                assert rewards[row, k] == (0 if over else total % 5)
                over = over or total % 3 == 0
                at += T
                if k == K - 1:
                    break
                said = [] if over else [3 + (total + i) % 7 for i in range(total % OBS + 1)][::-1]
                here = slice(at, at + OBS)
                assert responses[row, here].tolist() == [PAD] * (OBS - len(said)) + said
                expected = [False] * (OBS - len(said)) + [True] * len(said)
                assert real[row, P:][here].tolist() == expected
                assert not mask[row, here].any()
                at += OBS
            assert bool(episodes.done[row]) == over
            assert int(episodes.state["sum"][row]) == total
            assert int(episodes.state["turn"][row]) == episodes.turns[row].sum()
            assert float(episodes.returns[row]) == rewards[row].sum()
        assert not episodes.outside.any()

    def test_log_probs_are_those_of_a_pass_over_the_whole_episode(self, acted: Any) -> None:
        model, params, _, episodes = acted
        samples = episodes.rollout
        of = jax.jit(partial(response_log_probs, model, num_tokens=LENGTH))
        again, _ = of(params, samples.tokens, samples.attention_mask)
        expected = np.where(samples.response_mask, again, 0.0)
        np.testing.assert_allclose(samples.log_probs, expected, rtol=1e-5, atol=1e-5)
        junk = np.where(samples.attention_mask, samples.tokens, 7)
        same, _ = of(params, junk, samples.attention_mask)
        assert_same(np.where(samples.response_mask, same, 0.0), expected)

    def test_a_row_does_not_depend_on_the_others(self, acted: Any) -> None:
        _, params, run, episodes = acted
        others = jax.random.split(jax.random.key(6), B)
        longest = int(jnp.argmax(episodes.turns.sum(1)))
        for row in (0, longest):
            here = jnp.arange(B) == row
            keys = jax.random.wrap_key_data(
                jnp.where(here[:, None], *map(jax.random.key_data, (RESETS, others)))
            )
            again = run(params, keys, KEY)
            pick = partial(jax.tree.map, lambda x, row=row: x[row])
            assert_close(pick(again), pick(episodes), atol=1e-5)
            assert_same(pick(again.rollout.tokens), pick(episodes.rollout.tokens))

    def test_a_transcript_tells_who_wrote_what(self, acted: Any) -> None:
        samples = jax.device_get(acted[3].rollout)
        for row, pieces in enumerate(rollout.transcripts(samples)):
            assert [own for own, _ in pieces] == [i % 2 == 1 for i in range(len(pieces))]
            whole = [token for _, tokens in pieces for token in tokens]
            assert whole == samples.tokens[row][samples.attention_mask[row]].tolist()
            written = [token for own, tokens in pieces if own for token in tokens]
            assert written == samples.responses[row][samples.response_mask[row]].tolist()

    def test_who_judges_one_may_read_the_observations(self, acted: Any) -> None:
        episodes = jax.device_get(acted[3])
        read, between = episodes.with_observations, 0
        for row, (_, *pieces) in enumerate(rollout.transcripts(episodes.rollout)):
            behind = [token for _, tokens in pieces for token in tokens]
            assert read.responses[row][read.response_mask[row]].tolist() == behind
            between += sum(not own for own, _ in pieces)
        assert between > 0
        np.testing.assert_array_equal(read.tokens, episodes.rollout.tokens)


def test_an_episode_of_one_turn_is_what_generate_gives_to_the_bit() -> None:
    model = MODELS["learned positions"]
    params = scattered(model, seed=1)
    samples = compiled(model, num_turns=1)(params, RESETS, KEY).rollout
    generate = jax.jit(partial(rollout.generate, model, num_tokens=T, pad_token=PAD, end_token=END))
    prompt_mask = samples.attention_mask[:, :P]
    assert_same(generate(params, samples.prompts, prompt_mask, KEY), samples)


def test_in_python_they_are_the_same(episodes: rollout.Episodes) -> None:
    environment = InPython(np.asarray(jax.vmap(reset)(RESETS)[1]))
    in_python = rollout.make_act(
        MODELS["not Flax"], environment, prompt_tokens=P, observation_tokens=OBS,
        value_of=lambda _, hidden: hidden[:, 0], **SETTINGS,
    )  # fmt: skip
    given = in_python(PARAMS, range(B), KEY)
    assert given.state is None
    assert_close(given, replace(episodes, state=None), atol=1e-5)
    assert_same(given.rollout.tokens, episodes.rollout.tokens)
    # Rows whose episode is over are not asked for.
    assert environment.asked == np.asarray(episodes.turns.sum(0)).tolist()


def test_values_are_read_from_the_states_that_tokens_are_sampled_from(
    episodes: rollout.Episodes,
) -> None:
    samples, model = episodes.rollout, MODELS["not Flax"]
    hidden = model.hidden(PARAMS, samples.tokens, samples.attention_mask)[:, P - 1 : -1, 0]
    mask = np.asarray(samples.response_mask)
    np.testing.assert_allclose(samples.values[mask], hidden[mask], rtol=1e-5, atol=1e-5)


def test_without_an_end_token_turns_have_all_their_tokens_and_a_greedy_sampler_is_used() -> None:
    episodes = compiled(bigram(V), end_token=None, sampler=sampling.greedy)(
        {"table": jnp.roll(jnp.eye(V), 1, axis=1)}, RESETS, KEY
    )
    taken = np.asarray(episodes.turns)
    assert (episodes.rollout.response_mask.sum(1) == T * taken.sum(1)).all()
    first = np.asarray(episodes.rollout.prompts)[:, -1:]
    expected = (first + 1 + np.arange(T)) % V
    np.testing.assert_array_equal(episodes.rollout.responses[:, :T], expected)


class TestWhatGoesWrongInTheGraph:
    def test_what_never_ends_is_cut_off_and_counted(self) -> None:
        episodes = act(PARAMS, RESETS, KEY, (ENDLESS, 0))
        assert not episodes.done.any() and episodes.turns.all()
        assert int(episodes.metrics["episodes/truncated"]) == B
        assert float(episodes.metrics["episodes/turns"]) == K

    @pytest.mark.parametrize("token", [V, -2])
    def test_a_token_outside_of_the_vocabulary_leaves_its_row_out(
        self, episodes: rollout.Episodes, token: int
    ) -> None:
        strange = act(PARAMS, RESETS, KEY, (STRANGE, token))
        # Of those who take a third turn, the observation before it is read.
        outside = np.asarray(episodes.turns[:, 2])
        assert 0 < outside.sum() < B
        np.testing.assert_array_equal(strange.outside, outside)
        np.testing.assert_array_equal(np.isnan(strange.returns), outside)
        np.testing.assert_array_equal(strange.turns.sum(1), np.minimum(episodes.turns.sum(1), 2))
        assert int(strange.metrics["episodes/outside"]) == outside.sum()
        assert strange.metrics["episodes/return"] == episodes.returns[~outside].mean()
        assert strange.rollout.tokens.min() >= 0 and strange.rollout.tokens.max() < V
        for scores in (strange.returns, strange.token_rewards):
            samples, _ = iteration.leave_out_unscored(strange.rollout, scores)
            np.testing.assert_array_equal(samples.response_mask.any(1), ~outside)
        rollout.refuse_outside(episodes)
        with pytest.raises(ValueError) as error:
            rollout.refuse_outside(strange)
        message = str(error.value)
        assert f"environment.step: row {np.flatnonzero(outside)[0]} got a token out" in message
        assert message.endswith(f"after turn 2 of at most 3; {outside.sum()} of {B} rows got one")

    def test_one_in_the_prompt_is_an_episode_without_a_turn(self) -> None:
        episodes = act(PARAMS, RESETS, KEY, (STRANGE_PROMPT, V))
        outside = np.asarray((jax.vmap(reset)(RESETS)[1] == 5).any(1))
        assert 0 < outside.sum() < B
        np.testing.assert_array_equal(episodes.outside, outside)
        np.testing.assert_array_equal(episodes.turns.any(1), ~outside)
        first = np.flatnonzero(outside)[0]
        with pytest.raises(ValueError, match=f"reset: row {first} got .* in its prompt"):
            rollout.refuse_outside(episodes)
        assert np.isnan(episodes.returns[outside]).all()

    def test_an_empty_observation_is_the_padding_token(self) -> None:
        episodes = act(PARAMS, RESETS, KEY, (SILENT, 0))
        goes_on = np.asarray(episodes.turns[:, 1])
        observed = np.asarray(episodes.rollout.attention_mask)[:, P + T : P + T + OBS]
        np.testing.assert_array_equal(observed, goes_on[:, None] & [False, False, True])

    def test_models_without_extend_and_too_long_episodes_are_refused(self) -> None:
        model = MODELS["not Flax"]
        with pytest.raises(ValueError, match="fill in LanguageModel"):
            compiled(model._replace(extend=None))(PARAMS, RESETS, KEY)
        with pytest.raises(ValueError) as error:
            compiled(model._replace(context_length=18))(PARAMS, RESETS, KEY)
        assert "prompt of 4 tokens, 3 turns of 3" in str(error.value)
        assert "19 positions, which does not fit a context of 18" in str(error.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"pad_token": V},
                "pad_token=11 is not in the model's vocabulary of 11 tokens, 0 to 10",
            ),
            ({"pad_token": -1}, "pad_token=-1 is not in"),
            ({"end_token": V}, "end_token=11 is not in the model's vocabulary of 11"),
            ({"end_token": (END, -1)}, "end_token=-1 is not in"),
            ({"num_turns": 0}, "num_turns=0: an episode has at least one"),
            ({"num_tokens": 0}, "num_tokens=0: an episode has at least one"),
        ],
    )
    def test_settings_that_no_episode_has_are_refused(
        self, settings: dict[str, Any], message: str
    ) -> None:
        sizes = {"prompt_tokens": P, "observation_tokens": OBS}
        model = MODELS["not Flax"]
        for make in (
            lambda: compiled(model, **settings)(PARAMS, RESETS, KEY),
            lambda: rollout.make_act(model, InPython(None), **sizes | SETTINGS | settings),
        ):
            with pytest.raises(ValueError) as error:
                make()
            assert message in str(error.value)

    def test_each_kind_of_environment_has_its_own_act(self) -> None:
        model = MODELS["not Flax"]
        with pytest.raises(TypeError) as error:
            compiled(model, InPython(None))(PARAMS, RESETS, KEY)
        assert "Python is for `make_act`" in "".join(error.value.__notes__)
        sizes = {"prompt_tokens": P, "observation_tokens": OBS}
        with pytest.raises(ValueError, match="`make_act` is for an environment in Python; for an"):
            rollout.make_act(model, ENVIRONMENT, **sizes | SETTINGS)


@pytest.fixture(scope="module")
def episodes() -> rollout.Episodes:
    return act(PARAMS, RESETS, KEY)


class TestLearning:
    def test_rewards_of_turns_are_at_their_last_tokens(self, episodes: rollout.Episodes) -> None:
        expected = np.zeros((B, LENGTH), np.float32)
        mask = np.asarray(episodes.rollout.response_mask)
        for row in range(B):
            for k in range(K):
                first = k * (T + OBS)
                written = np.flatnonzero(mask[row, first : first + T])
                if len(written):
                    expected[row, first + written[-1]] = episodes.rewards[row, k]
        np.testing.assert_array_equal(episodes.token_rewards, expected)
        assert (expected != 0).sum(1).max() == K

    @pytest.mark.parametrize("convention", ["skip", "zero", "none"])
    def test_advantages_across_the_gaps(self, episodes: rollout.Episodes, convention: str) -> None:
        mask = episodes.rollout.response_mask
        rng = np.random.default_rng(0)
        rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
        everywhere = episodes.with_observations.response_mask
        inputs = {
            "skip": (rewards, values, mask),
            "zero": (masked.fill(rewards, mask), masked.fill(values, mask), everywhere),
            "none": (rewards, values, everywhere),
        }[convention]
        given, _ = advantages.gae(*inputs, gamma=0.9, gae_lambda=0.8)
        assert 0 < everywhere.sum() - mask.sum() < mask.size - mask.sum()
        for row in range(B):
            following, advantage = 0.0, 0.0
            # The row as it is without its padding.
            pieces = np.flatnonzero(episodes.rollout.attention_mask[row]).tolist()
            for t in reversed([place - P for place in pieces if place >= P]):
                own = bool(mask[row, t])
                if convention == "skip" and not own:
                    continue
                read = own or convention == "none"
                reward, value = (float(x[row, t]) if read else 0.0 for x in (rewards, values))
                advantage = reward + 0.9 * following - value + 0.9 * 0.8 * advantage
                following = value
                np.testing.assert_allclose(given[row, t], advantage, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("peer", "skips"), [("verl", True), ("openrlhf", False)])
    def test_so_do_peers_across_the_observations_of_theirs(self, peer: str, skips: bool) -> None:
        case = decoded(f"gae/{peer}/obs/raw")
        x = case.inputs
        rewards, values, mask = (jnp.asarray(x[name]) for name in ("rewards", "values", "mask"))
        if not skips:
            rewards, values = masked.fill(rewards, mask), masked.fill(values, mask)
        across = mask if skips else jnp.ones_like(mask)
        given, _ = advantages.gae(rewards, values, across, gamma=x["gamma"], gae_lambda=x["lam"])
        expected = np.asarray(case.expected["advantages"])
        np.testing.assert_allclose(given[mask], expected[np.asarray(mask)], rtol=2e-5, atol=2e-6)

    def test_tokens_that_the_policy_did_not_write_have_no_gradient(
        self, episodes: rollout.Episodes
    ) -> None:
        """Of a model whose parameters are the logits at each place."""
        samples, mask = episodes.rollout, np.asarray(episodes.rollout.response_mask)
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, LENGTH, V)), jnp.float32)
        model = bigram(V)._replace(
            hidden=lambda params, *_, **__: params, logits=lambda _, hidden: hidden
        )
        pair = models.ActorCritic(
            model,
            lambda key: logits,
            lambda params, *_, **__: (params["policy"], params["value"]),
            None,
        )
        params = {"policy": logits, "value": logits[..., 0]}
        hyper = ppo.Hyperparameters(entropy_coef=0.1, value_coef=0.1)

        @jax.jit
        def of_ppo(params: Any) -> Any:
            batch, _ = ppo.experience(
                params, samples, episodes.token_rewards, logits + 0.1, hyper, 0.1, model=pair
            )
            return jax.grad(lambda params: ppo.loss(params, batch, hyper, model=pair)[0])(params)

        @jax.jit
        @jax.grad
        def of_grpo(logits: jax.Array) -> jax.Array:
            data = critic_free.experience(
                samples, episodes.returns, params["policy"] + 0.1, grpo.Hyperparameters(),
                model=model, group_size=4,
            )  # fmt: skip
            data = grpo.estimate(data, grpo.Hyperparameters())
            log_probs, _ = response_log_probs(
                model, logits, samples.tokens, samples.attention_mask, LENGTH
            )
            return grpo.loss(log_probs, data, grpo.Hyperparameters())[0]

        by_ppo = of_ppo(params)
        for grads in (by_ppo["policy"], by_ppo["value"][..., None], of_grpo(logits)):
            moved = np.asarray(grads != 0).any(-1)
            np.testing.assert_array_equal(moved[~mask], False)
            assert moved[mask].mean() > 0.5

    def test_ppo_takes_one_score_or_the_rewards_of_tokens(self, episodes: rollout.Episodes) -> None:
        """A score at the last token is a reward there."""
        samples = episodes.rollout
        model = MODELS["not Flax"]
        pair = models.shared_trunk(model, models.linear_head(8, stddev=0.1))
        params = pair.init(jax.random.key(0))
        of = jax.jit(
            lambda scores: ppo.experience(
                params, samples, scores, params["policy"], ppo.Hyperparameters(), 0.1, model=pair
            )
        )
        scores = episodes.returns.at[1].set(jnp.nan)
        assert_same(of(advantages.score_at_end(scores, samples.response_mask)), of(scores))

    def test_groups_share_what_they_reset_with(self) -> None:
        keys = jnp.repeat(jax.random.split(KEY, 2), B // 2)
        episodes = act(PARAMS, keys, KEY)
        prompts = np.asarray(episodes.rollout.prompts).reshape(2, -1, P)
        assert (prompts == prompts[:, :1]).all() and (prompts[0] != prompts[1]).any()
        assert len(np.unique(episodes.rollout.responses, axis=0)) > 4

    def test_ppo_finds_the_best_way_through_two_turns(self) -> None:
        """3 earns 0.5 at once; 4 nothing, but then 5 earns 1. Who is greedy has 0.5."""
        model = recurrent(8, 16)
        pair = models.shared_trunk(model, models.linear_head(16, stddev=0.1))

        def go(state: Any, tokens: jax.Array) -> tuple[Any, ...]:
            turn, first = state
            later = jnp.where((first == 4) & (tokens[0] == 5), 1.0, 0.0)
            reward = jnp.where(turn == 0, jnp.where(tokens[0] == 3, 0.5, 0.0), later)
            return (turn + 1, jnp.where(turn == 0, tokens[0], first)), tokens, reward, turn == 1

        environment = rollout.Environment(
            lambda key: ((jnp.int32(0), jnp.int32(0)), jnp.array([1])), go
        )
        optimizer = optax.adam(1e-2)
        config = ppo.Config(1, 0, num_minibatches=1, num_epochs=4)

        def iterate(state: ppo.State, _: None) -> tuple[ppo.State, jax.Array]:
            reset_key, key = jax.random.split(iteration.keys(state)[0])
            episodes = rollout.act(
                model, state.params["policy"], environment, jax.random.split(reset_key, 64), key,
                num_turns=2, num_tokens=1, pad_token=0,
            )  # fmt: skip
            state, _ = ppo.learn(
                state, episodes.rollout, episodes.token_rewards, state.params["policy"],
                ppo.Hyperparameters(), model=pair, optimizer=optimizer, config=config,
            )  # fmt: skip
            return state, episodes.returns.mean()

        state = ppo.init(pair.init(KEY), optimizer, KEY, kl_coef=0.0)
        _, returns = jax.jit(lambda state: jax.lax.scan(iterate, state, length=80))(state)
        assert returns[0] < 0.3 and returns[-5:].mean() > 0.95


def test_adapters_extend_what_their_base_extends() -> None:
    model = MODELS["not Flax"]
    adapters = models.lora.init(KEY, PARAMS, rank=2, pattern="mixing")
    adapters["mixing"]["b"] += 1.0
    merge = partial(models.lora.merge, scale=1.0)
    on = models.lora.on(model, PARAMS, combine=merge)
    cache, more, real = jnp.ones((1, 8)), jnp.array([[7, 8]]), jnp.array([[False, True]])
    assert on.extend is not None and model.extend is not None
    expected = model.extend(merge(PARAMS, adapters), cache, more, real)
    assert_same(on.extend(adapters, cache, more, real), expected)
    bare = models.lora.on(model._replace(extend=None), PARAMS, combine=merge)
    assert bare.extend is None


def test_a_rollout_needs_no_more_than_its_masks() -> None:
    samples = Rollout(
        jnp.array([[0, 5, 6, 7]]), jnp.array([[False, True, True, True]]),
        jnp.array([[False, True, False]]), jnp.zeros((1, 3)),
    )  # fmt: skip
    assert rollout.transcripts(samples) == [[(False, [5]), (True, [6]), (False, [7])]]
