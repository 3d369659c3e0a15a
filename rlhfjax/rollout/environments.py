"""What a policy acts in: an environment in the graph, or a Python object with the same methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax.tools import NO_TOKEN


class Environment(NamedTuple):
    """An environment in the graph, of one episode; `act` takes many of them at once.

    Attributes:
      reset: `(key) -> (state, prompt [P])`, an episode and its first observation.
      step: `(state, tokens [T]) -> (state, observation [O], reward [], done [] bool)`, what follows
        a turn of the policy. `tokens` is -1 behind the end of the turn.

    A state is any tree of arrays, of the same shapes ever after. Observations are integers, where
    -1 is no token: what is left is moved to the end. An observation without a token that is read
    is the padding token, because every token of the policy follows one.
    """

    reset: Callable[[Array], tuple[Any, Array]]
    step: Callable[[Any, Array], tuple[Any, Array, Array, Array]]


class PythonEnvironment(Protocol):
    """An environment in Python, of many episodes at once; called with these argument names.

    A step must leave the states that it is given as they are: where it fails, the rows are asked
    for one by one, so that the error can name the first that fails. So any of the two may also be a
    `rewards.Worker` around a function of a module, which puts a limit to its time.
    """

    def reset(self, seeds: Sequence[int]) -> tuple[Sequence[Any], Sequence[Sequence[int]]]:
        """An episode for each seed: B states of any kind, and B prompts of tokens."""

    def step(
        self, states: Sequence[Any], tokens: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Any], Sequence[Sequence[int]], Sequence[float], Sequence[bool]]:
        """What follows the turns of the episodes that go on: states, observations, rewards, done.

        Of `tokens` each row has those that the policy wrote, the end token with them.
        """


def with_tool(
    pose: Callable[[Array], tuple[Any, Array]],
    tool: Callable[[Any, Array], Array],
    grade: Callable[[Any, Array], Array],
) -> Environment:
    """Questions that may be answered with the help of a tool.

    A turn that calls the tool is followed by what the tool says, and earns nothing. A turn that
    does not is the answer: it is graded and ends the episode.

    Args:
      pose: `(key) -> (state, prompt [P])`, a question.
      tool: `(state, tokens [T]) -> [O]`, -1 throughout where the turn is no call; see `tools`. A
        call that fails is -1 throughout too, and so counts as the answer: a tool that is to be read
        as "no such record" must say so in tokens.
      grade: `(state, tokens [T]) -> []`, the reward of an answer.

    Returns:
      the environment; its states stay what `pose` made them.
    """

    def step(state: Any, tokens: Array) -> tuple[Any, Array, Array, Array]:
        said = tool(state, tokens)
        called = (said != NO_TOKEN).any()
        reward = jnp.where(called, 0.0, jnp.asarray(grade(state, tokens), jnp.float32))
        return state, said, reward, ~called

    return Environment(pose, step)


class WithPythonTool:
    """`with_tool` for functions in Python, of tokens or of the text that they stand for.

    Args:
      pose: `(seed) -> (state, prompt)`.
      tool: `(calls) -> answers`, the tool's tokens for each turn, None where it is no call; any
        function with a parameter of the name `calls`, or a `rewards.Worker` around one, and then
        with a limit to its time.
      grade: `(state, tokens) -> reward` of an answer.
    """

    def __init__(
        self,
        pose: Callable[[int], tuple[Any, Sequence[int]]],
        tool: Callable[..., Sequence[Sequence[int] | None]],
        grade: Callable[[Any, Sequence[int]], float],
    ) -> None:
        self._pose, self._tool, self._grade = pose, tool, grade

    def reset(self, seeds: Sequence[int]) -> tuple[Sequence[Any], Sequence[Sequence[int]]]:
        """A question for each seed."""
        posed = [self._pose(seed) for seed in seeds]
        return [state for state, _ in posed], [prompt for _, prompt in posed]

    def step(
        self, states: Sequence[Any], tokens: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Any], Sequence[Sequence[int]], Sequence[float], Sequence[bool]]:
        """What the tool says, or the grade of an answer."""
        said = _answers(self._tool, tokens)
        rewards = [
            self._grade(state, turn) if answer is None else 0.0
            for state, turn, answer in zip(states, tokens, said, strict=True)
        ]
        told = [[] if answer is None else list(answer) for answer in said]
        return states, told, rewards, [answer is None for answer in said]


def _answers(
    tool: Callable[..., Sequence[Sequence[int] | None]], calls: Sequence[Sequence[int]]
) -> Sequence[Sequence[int] | None]:
    """Checked here: `ask_step` sees of them no more than what they become in an observation."""
    answers = tool(calls=calls)
    where = f"the tool {getattr(tool, '__name__', type(tool).__name__)}"
    wanted = "return a list with one for each, None or a list of token numbers"
    size = _size(answers)
    if size != len(calls):
        told = _cut(repr(answers)) if size is None else f"{size} answers"
        raise ValueError(f"{where} returned {told} for {len(calls)} calls: {wanted}")
    for number, answer in enumerate(answers):
        if answer is not None and not _are_tokens(_as_array(answer)):
            raise ValueError(
                f"{where} returned {_cut(repr(answer))} for call {number} of {len(calls)}: {wanted}"
            )
    return answers


def check(environment: Environment, *, num_tokens: int) -> tuple[int, int]:
    """Refuses an environment whose functions do not fit together, before anything is compiled.

    Args:
      environment: in the graph.
      num_tokens: T.

    Returns:
      P and O.

    Raises:
      ValueError: with the method, and what it returned of another shape or dtype than it must.
    """
    state, prompt = _shapes("reset", ("state", "prompt"), environment.reset, _key())
    turn = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    fields = "state", "observation", "reward", "done"
    after, observation, reward, done = _shapes("step", fields, environment.step, state, turn)
    for method, name, tokens in (("reset", "prompt", prompt), ("step", "observation", observation)):
        if not _is(tokens, jnp.integer, rank=1) or not tokens.shape[0]:
            _refuse(method, name, tokens, "integers of one axis, at least one of them")
    if not (_is(reward, jnp.floating, rank=0) or _is(reward, jnp.integer, rank=0)):
        _refuse("step", "reward", reward, "one number, not a batch of them")
    if not _is(done, jnp.bool_, rank=0):
        _refuse("step", "done", done, "one bool")
    before, now = (dict(_leaves(tree)) for tree in (state, after))
    for name in [*before, *now]:
        if _told(now.get(name)) != _told(before.get(name)):
            wanted = f"{_told(before.get(name))}, as reset made it"
            _refuse("step", f"state{name}", now.get(name), wanted)
    structures = [str(jax.tree.structure(tree)) for tree in (state, after)]
    if structures[0] != structures[1]:
        _refuse("step", "state", after, f"{structures[0]}, as reset made it")
    return prompt.shape[0], observation.shape[0]


def ask_reset(
    environment: PythonEnvironment, seeds: Sequence[int]
) -> tuple[list[Any], list[list[int]]]:
    """Episodes of a Python environment.

    Args:
      environment: the environment.
      seeds: one a row.

    Returns:
      states, and prompts without what is no token.

    Raises:
      ValueError: with the row where it failed or returned what it must not.
    """
    names = "states", "prompts"
    rows = list(range(len(seeds)))
    states, prompts = _ask(environment, "reset", names, rows, {"seeds": list(seeds)})
    return list(states), _all_tokens("reset", "prompt", rows, prompts)


def ask_step(
    environment: PythonEnvironment,
    rows: Sequence[int],
    states: Sequence[Any],
    tokens: Sequence[Sequence[int]],
) -> tuple[list[Any], list[list[int]], list[float], list[bool]]:
    """What follows the turns of some rows in a Python environment.

    Args:
      environment: the environment.
      rows: their numbers in the batch, for messages.
      states: of each.
      tokens: that the policy wrote in each.

    Returns:
      states, observations without what is no token, rewards, and whether they are done.

    Raises:
      ValueError: with the row where it failed or returned what it must not.
    """
    names = "states", "observations", "rewards", "done"
    given = {"states": list(states), "tokens": [list(turn) for turn in tokens]}
    after, observations, rewards, done = _ask(environment, "step", names, rows, given)
    for row, reward, ended in zip(rows, rewards, done, strict=True):
        number, flag = _as_array(reward), _as_array(ended)
        if number is None or number.shape or number.dtype.kind not in "biuf":
            raise ValueError(f"environment.step: the reward of row {row} is {reward!r}: no number")
        if flag is None or flag.shape or flag.dtype != bool:
            raise ValueError(f"environment.step: done of row {row} is {ended!r}: no bool")
    observed = _all_tokens("step", "observation", rows, observations)
    return list(after), observed, [float(x) for x in rewards], [bool(x) for x in done]


def _ask(
    environment: PythonEnvironment,
    method: str,
    names: tuple[str, ...],
    rows: Sequence[int],
    given: dict[str, Any],
) -> Sequence[Any]:
    """The columns that it returns, or an error with the first row that fails by itself."""
    function = getattr(environment, method)
    try:
        returned = function(**given)
    except Exception as error:
        for number, row in enumerate(rows):
            alone = {name: column[number : number + 1] for name, column in given.items()}
            try:
                function(**alone)
            except Exception as own:
                raise ValueError(
                    f"environment.{method} failed for row {row}: {own!r}; it was given "
                    f"{_shortly(alone)}"
                ) from own
        raise ValueError(
            f"environment.{method} failed for {len(rows)} rows at once, and for none alone: "
            f"{error!r}"
        ) from error
    where = f"environment.{method} of {type(environment).__name__}"
    # What a dictionary lists are its keys.
    if not isinstance(returned, tuple | list) or len(returned) != len(names):
        told = f"{len(returned)} values" if isinstance(returned, tuple | list) else repr(returned)
        raise ValueError(f"{where} returned {_cut(told)}: return a tuple of {', '.join(names)}")
    for name, column in zip(names, returned, strict=True):
        size = _size(column)
        if size is None:
            raise ValueError(
                f"{where} returned {_cut(repr(column))} as {name}: return a list, one for each of "
                f"{len(rows)} rows"
            )
        if size != len(rows):
            raise ValueError(
                f"{where} returned {size} {name} for {len(rows)} rows: return one for each"
            )
    return returned


def _all_tokens(
    method: str, name: str, rows: Sequence[int], columns: Sequence[Sequence[int]]
) -> list[list[int]]:
    found = []
    for row, tokens in zip(rows, columns, strict=True):
        array = _as_array(tokens)
        if array is None or not _are_tokens(array):
            told = _cut(repr(tokens)) if array is None else _told(array)
            raise ValueError(
                f"environment.{method}: the {name} of row {row} is {told}: return a list of token "
                "numbers"
            )
        found.append(array[array != NO_TOKEN].astype(int).tolist())
    return found


def _size(column: Any) -> int | None:
    """None where it is no list, nor anything like one."""
    try:
        return None if isinstance(column, Mapping | Set) else len(column)
    except TypeError:
        return None


def _are_tokens(array: np.ndarray | None) -> bool:
    if array is None or array.ndim != 1:
        return False
    return not array.size or np.issubdtype(array.dtype, np.integer)


def _as_array(x: Any) -> np.ndarray | None:
    """None where NumPy makes none of it, such as of lists of unequal lengths."""
    try:
        return np.asarray(x)
    except (TypeError, ValueError):
        return None


def _shortly(given: dict[str, Any]) -> str:
    return _cut(", ".join(f"{name}={column!r}" for name, column in given.items()))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _shapes(
    method: str, names: tuple[str, ...], function: Callable[..., Any], *inputs: Any
) -> tuple[Any, ...]:
    try:
        result = jax.eval_shape(function, *inputs)
    except Exception as error:
        error.add_note(
            f"in environment.{method}, traced before anything is compiled; an environment in "
            "Python is for `make_act`"
        )
        raise
    if not isinstance(result, tuple) or len(result) != len(names):
        what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(f"environment.{method} returned {what}: return ({', '.join(names)})")
    return result


def _is(x: Any, kind: Any, *, rank: int) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, kind) and len(x.shape) == rank


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _told(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else "nothing"


def _refuse(method: str, name: str, given: Any, wanted: str) -> None:
    told = _told(given) if given is None or hasattr(given, "dtype") else jax.tree.structure(given)
    raise ValueError(f"environment.{method} returned {told} as {name}: it must be {wanted}")
