"""Environments that are not what they must be, and the one around a tool."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import bigram
from tool_functions import BAD, SLOW, echo

from rlhfjax import rewards, rollout
from rlhfjax.rollout.environments import ask_step

V, T = 11, 3
KEY = jax.random.key(0)
TABLE = {"table": 50.0 * jnp.roll(jnp.eye(V), 1, axis=1)}
"""Each token is followed by the next one."""


def reset(key: jax.Array) -> tuple[Any, jax.Array]:
    return {"count": jnp.int32(0)}, jnp.array([3, 4])


def step(state: Any, tokens: jax.Array) -> tuple[Any, ...]:
    return state, tokens[:2], jnp.float32(1), jnp.bool_(True)


def result(place: int, value: Any) -> Any:
    """The step, with another value in that place."""

    def changed(state: Any, tokens: jax.Array) -> tuple[Any, ...]:
        usual = step(state, tokens)
        return *usual[:place], value, *usual[place + 1 :]

    return changed


WRONG = {
    "a prompt of floats": ((lambda key: (0, jnp.zeros(3)), step), "reset returned float32[3] as p"),
    "no prompt": ((lambda key: (0, jnp.zeros(0, int)), step), "reset returned int32[0] as prompt"),
    "a batch of prompts": (
        (lambda key: (0, jnp.zeros((2, 3), int)), step), "reset returned int32[2, 3] as prompt",
    ),
    "a prompt alone": ((lambda key: jnp.zeros(3, int), step), "reset returned ShapeDtypeStruct"),
    "three values": ((reset, lambda *given: step(*given)[:3]), "step returned 3 values: return (s"),
    "an observation of floats": (
        (reset, result(1, jnp.zeros(2))), "step returned float32[2] as observation: it must be int",
    ),
    "a batch of rewards": ((reset, result(2, jnp.zeros(2))), "step returned float32[2] as reward"),
    "a number for done": ((reset, result(3, jnp.int32(1))), "step returned int32[] as done: it mu"),
    "another dtype in the state": (
        (reset, result(0, {"count": jnp.float32(0)})),
        "step returned float32[] as state['count']: it must be int32[], as reset made it",
    ),
    "another shape in the state": (
        (reset, result(0, {"count": jnp.zeros(2, int)})), "int32[2] as state['count']: it must be",
    ),
    "something new in the state": (
        (reset, result(0, {"count": jnp.int32(0), "new": jnp.int32(0)})),
        "step returned int32[] as state['new']: it must be nothing, as reset made it",
    ),
    "less in the state": ((reset, result(0, {})), "step returned nothing as state['count']"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_method_and_the_field_are_named(name: str) -> None:
    functions, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        rollout.act(
            bigram(V), TABLE, rollout.Environment(*functions), KEY[None], KEY,
            num_turns=2, num_tokens=T, pad_token=0,
        )  # fmt: skip
    assert f"environment.{message}" in str(error.value) or message in str(error.value)


def test_what_it_raises_while_it_is_traced_says_where() -> None:
    def broken(state: Any, tokens: jax.Array) -> Any:
        raise KeyError("a bug")

    with pytest.raises(KeyError) as error:
        rollout.check(rollout.Environment(reset, broken), num_tokens=T)
    assert any("in environment.step" in note for note in error.value.__notes__)
    assert rollout.check(rollout.Environment(reset, step), num_tokens=T) == (2, 2)


class TestWithTool:
    def test_a_call_is_answered_and_an_answer_graded(self) -> None:
        def tool(state: Any, tokens: jax.Array) -> jax.Array:
            return jnp.where(tokens[0] == 5, jnp.array([6, -1]), -1)

        environment = rollout.with_tool(
            lambda key: (jnp.int32(7), jnp.array([1])),
            tool,
            lambda state, tokens: tokens[0] == state,
        )
        call, right, wrong = (jnp.array([x, -1]) for x in (5, 7, 4))
        state, said, reward, done = environment.step(jnp.int32(7), call)
        assert (int(state), said.tolist(), float(reward), bool(done)) == (7, [6, -1], 0.0, False)
        for turn, expected in ((right, 1.0), (wrong, 0.0)):
            _, said, reward, done = environment.step(jnp.int32(7), turn)
            assert (said.tolist(), float(reward), bool(done)) == ([-1, -1], expected, True)
        assert rollout.check(environment, num_tokens=2) == (1, 2)


class Echo:
    """Episodes of as many tokens as one likes, with a fault in one row."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults

    def reset(self, seeds: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        return list(seeds), self.faults.get("prompts", [[seed] for seed in seeds])

    def step(self, states: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        if "returns" in self.faults:
            return self.faults["returns"]
        if "raises" in self.faults and self.faults["raises"] in states:
            raise KeyError("a bug")
        number = len(states)
        said = self.faults.get("observations", [[3]] * number)
        given = self.faults.get("rewards", [1.0] * number)
        done = self.faults.get("done", [False] * number)
        return self.faults.get("states", states), said, given, done


def in_python(environment: Any, **settings: Any) -> Any:
    sizes = {"num_turns": 2, "num_tokens": 1, "prompt_tokens": 2, "observation_tokens": 2}
    return rollout.make_act(bigram(V), environment, pad_token=0, **sizes | settings)


FAULTY = Echo()
RAGGED = [[3], [3, 4]]
ACT = in_python(FAULTY)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"raises": 5}, "environment.step failed for row 2: KeyError('a bug'); it was given"),
        (
            {"prompts": [[3], [3], [V]]},
            f"reset: the prompt of row 2 has token {V}, but the model's",
        ),
        ({"prompts": [[3], [-2], [3]]}, "reset: the prompt of row 1 has token -2"),
        ({"prompts": [[3], [3] * 3, [3]]}, "prompt of row 1 has 3 tokens, and there is room for 2"),
        ({"prompts": [[3], [3]]}, "reset of Echo returned 2 prompts for 3 rows"),
        ({"prompts": [[3], [3], [0.5]]}, "the prompt of row 2 is float64[1]: return a list of"),
        ({"observations": [[3], [V], [3]]}, f"step: the observation of row 1 has token {V}"),
        ({"observations": [[3] * 3] * 3}, "the observation of row 0 has 3 tokens"),
        ({"rewards": [1.0, "much", 1.0]}, "the reward of row 1 is 'much': no number"),
        ({"rewards": [1.0, [1.0], 1.0]}, "the reward of row 1 is [1.0]: no number"),
        ({"rewards": [1.0]}, "step of Echo returned 1 rewards for 3 rows"),
        ({"done": [False, 1, False]}, "done of row 1 is 1: no bool"),
        (
            {"returns": None},
            "environment.step of Echo returned None: return a tuple of states, observations, rew",
        ),
        (
            {"returns": {"states": [3] * 3, "observations": RAGGED, "rewards": 0, "done": 0}},
            "environment.step of Echo returned {'states': [3, 3, 3], 'observations': [[3], [3, 4]]"
            ", 'rewards': 0, 'done': 0}: return a tuple of states, observations, rewards, done",
        ),
        (
            {"returns": ()},
            "step of Echo returned 0 values: return a tuple of states, observations,",
        ),
        (
            {"rewards": None},
            "step of Echo returned None as rewards: return a list, one for each of 3 rows",
        ),
        ({"rewards": {0: 1.0, 1: 0.5, 2: 0.0}}, "returned {0: 1.0, 1: 0.5, 2: 0.0} as rewards: re"),
        ({"states": 7}, "step of Echo returned 7 as states: return a list"),
        ({"states": np.array(7)}, "step of Echo returned array(7) as states: return a list"),
        ({"prompts": None}, "reset of Echo returned None as prompts: return a list"),
        (
            {"prompts": [[3], [3], RAGGED]},
            "reset: the prompt of row 2 is [[3], [3, 4]]: return a list of token numbers",
        ),
        ({"observations": [[3], RAGGED, [3]]}, "the observation of row 1 is [[3], [3, 4]]: return"),
        ({"observations": [[3], None, [3]]}, "the observation of row 1 is object[]: return"),
        ({"rewards": [1.0, RAGGED, 1.0]}, "the reward of row 1 is [[3], [3, 4]]: no number"),
        ({"done": [False, RAGGED, False]}, "done of row 1 is [[3], [3, 4]]: no bool"),
    ],
)
def test_in_python_the_row_is_named(faults: dict[str, Any], message: str) -> None:
    FAULTY.faults = faults
    with pytest.raises(ValueError) as error:
        ACT(TABLE, [3, 4, 5], KEY)
    assert message in str(error.value)


def test_one_process_of_several_does_not_act_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="Python is asked by one process, and there are 2"):
        in_python(FAULTY)


class TestPythonTool:
    """A policy that says what comes after what it was told; 3 is an answer."""

    def act(self, tool: Any, seeds: Sequence[int]) -> rollout.Episodes:
        environment = rollout.WithPythonTool(
            lambda seed: (seed, [seed]), tool, lambda state, tokens: float(state == 2)
        )
        return in_python(environment, num_turns=3)(TABLE, seeds, KEY)

    def test_calls_are_answered_until_the_answer(self) -> None:
        episodes = self.act(echo, [1, 2, 4])
        pieces = rollout.transcripts(episodes.rollout)
        assert pieces[0] == [(False, [1]), (True, [2]), (False, [2]), (True, [3])]
        assert pieces[1] == [(False, [2]), (True, [3])]
        told = [4, 5, 5, 6, 6, 7]
        assert [token for _, tokens in pieces[2] for token in tokens] == told
        assert episodes.done.tolist() == [True, True, False]
        assert episodes.returns.tolist() == [0.0, 1.0, 0.0]
        assert float(episodes.metrics["episodes/truncated"]) == 1

    def test_answers_may_be_arrays_and_empty(self) -> None:
        environment = rollout.WithPythonTool(
            lambda seed: (seed, [seed]),
            lambda calls: [np.array([6, 7]), np.array([], int), [], None],
            lambda state, tokens: 1.0,
        )
        turns = [[5]] * 4
        _, said, rewards, done = ask_step(environment, range(4), range(4), turns)
        assert said == [[6, 7], [], [], []]
        assert (rewards, done) == ([0.0] * 3 + [1.0], [False] * 3 + [True])

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ([[6]], "the tool faulty returned 1 answers for 2 calls: return a list with one for"),
            ({5: [6]}, "the tool faulty returned {5: [6]} for 2 calls: return a list"),
            (None, "the tool faulty returned None for 2 calls: return a list"),
            (([6] for _ in range(2)), "the tool faulty returned <generator"),
            ([6, 7], "the tool faulty returned 6 for call 0 of 2: return a list"),
            ([None, "text"], "the tool faulty returned 'text' for call 1 of 2: return a list"),
            ([[6], [0.5]], "the tool faulty returned [0.5] for call 1 of 2"),
            ([[6], RAGGED], "the tool faulty returned [[3], [3, 4]] for call 1 of 2"),
        ],
    )
    def test_what_it_returns_is_checked(self, answers: Any, message: str) -> None:
        def faulty(calls: Sequence[Sequence[int]]) -> Any:
            return answers

        environment = rollout.WithPythonTool(lambda seed: (seed, [seed]), faulty, lambda *_: 1.0)
        with pytest.raises(ValueError) as error:
            environment.step([1, 2], [[5], [5]])
        assert message in str(error.value)

    def test_a_function_in_a_process_of_its_own_has_a_time_limit(self) -> None:
        with rewards.Worker(echo, time_limit=20) as tool:
            assert self.act(tool, [1, 2]).returns.tolist() == [0.0, 1.0]
            with pytest.raises(ValueError) as error:
                self.act(tool, [1, BAD - 1])
            assert "step failed for row 1: KeyError('nothing is stored under 9')" in str(
                error.value
            )
            tool.time_limit = 0.3
            with pytest.raises(ValueError) as error:
                self.act(tool, [1, SLOW - 1])
            assert "step failed for row 1: TimeoutError('no answer within 0.3 s')" in str(
                error.value
            )


def test_numbers_of_numpy_and_python_are_rewards() -> None:
    FAULTY.faults = {"rewards": [np.float32(1.5), np.int64(2), True]}
    episodes = ACT(TABLE, [3, 4, 5], KEY)
    assert episodes.rewards.tolist() == [[1.5, 1.5], [2.0, 2.0], [1.0, 1.0]]
