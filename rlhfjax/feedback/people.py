"""People: many users on one shared model, each of them a small state, all in one program.

A user is an adapter or a vector beside a model that all users share:

- reward: `models.scalar_model(lora.on(model, base, combine=…), head)` has an adapter and a head as
  parameters, `embedded(scorer, shared)` a vector that the head reads;
- policy: the parameters of `lora.on(model, base, combine=combine)` are an adapter where `combine`
  is `lora.beside` or `lora.merge`, and a vector where it is `added`.

What is trained of a user is the state of any algorithm, such as `reward_model.init` makes of one
user's parameters. The states of all are that tree stacked along a leading axis N, and so one
checkpoint; `together` makes of a step for one user the step for all.

```python
def step(state, batch, base):
    scorer = models.scalar_model(lora.on(model, base, combine=combine), head)
    return reward_model.make_step(scorer, optimizer)(state, batch)

learn = sharding.Step(people.together(step))
states = people.start(shared, num_users=16)
batch = people.batches(feedback, names, num_pairs=32, vocab_size=model.vocab_size)
states, metrics = learn(states, batch.pairs.any(1), batch, base)
```

A place that nobody has is that of a user who never learns. `put(states, place, newcomer(shared,
place))` gives it to somebody, and no program is compiled again.

References:
  Hu et al. 2021, LoRA (adapters); Poddar et al. 2024, Personalizing Reinforcement Learning from
  Human Feedback with Variational Preference Learning (a vector for each user).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import sharding
from rlhfjax.feedback import stages
from rlhfjax.types import Params, PreferenceBatch, Rollout, ScalarModel

Step = Callable[..., tuple[Any, dict[str, Array]]]
MASKS = {"prompts": "prompt_mask", "chosen": "chosen_mask", "rejected": "rejected_mask"}
"""Tokens of a `PreferenceBatch` → where they are real."""
_KINDS: dict[str, tuple[Any, ...]] = {
    "integers": (jnp.integer,),
    "bool": (jnp.bool_,),
    "numbers": (jnp.floating, jnp.integer, jnp.bool_),
}


def newcomer(shared: Any, place: int | Array) -> Any:
    """A user who begins as the shared one; keys in the state become `fold_in(key, place)`.

    Args:
      shared: one user's state: any tree of arrays.
      place: of the user.

    Returns:
      a state of the same structure.
    """

    def own(x: Array) -> Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, place) if is_key else x

    return jax.tree.map(own, shared)


def start(shared: Any, *, num_users: int) -> Any:
    """The states of N users, each a `newcomer`.

    Args:
      shared: one user's state.
      num_users: N, places that nobody has yet included.

    Returns:
      the tree, its arrays [N, …].
    """
    return jax.vmap(newcomer, (None, 0))(shared, jnp.arange(num_users))


def user(states: Any, place: int | Array) -> Any:
    """One user's state.

    Args:
      states: of all, [N, …].
      place: of the user, see `place_of`; a traced one is not looked at.

    Returns:
      the tree without its leading axis.

    Raises:
      ValueError: nobody can have that place, or it is no whole number.
    """
    _check_place(states, place)
    return jax.tree.map(lambda x: x[place], states)


def put(states: Any, place: int | Array, state: Any) -> Any:
    """The states with another one at a place, those of all others as they were.

    Args:
      states: of all, [N, …].
      place: of the user; traced, so that one compiled program serves all places.
      state: one user's, of the same structure, shapes and dtypes.

    Returns:
      the states.

    Raises:
      ValueError: nobody can have that place, or it is no whole number; a traced one is not looked
        at. An array of the state has not the shape or dtype of those in the states.
    """
    _check_place(states, place)
    # Arrays of NumPy have the dtypes here that they will have on a device.
    own, state_shapes = jax.eval_shape(
        lambda states, state: (jax.tree.map(lambda x: x[place], states), state), states, state
    )
    _check_alike(own, state_shapes, "the state of a user", dtypes=True)
    return jax.tree.map(lambda all_users, own: all_users.at[place].set(own), states, state)


def _check_place(states: Any, place: Any) -> None:
    """An index out of range would be another user's, and what is written there nobody's."""
    if isinstance(place, slice) or np.ndim(place):
        return
    traced = isinstance(place, jax.core.Tracer)
    if not jnp.issubdtype(place.dtype if traced else np.asarray(place).dtype, jnp.integer):
        raise ValueError(
            f"a place is a whole number, not {place!r}: `place_of(names, name)` is that of a name"
        )
    if traced:
        return
    num_users = len(jax.tree.leaves(states)[0])
    if not 0 <= int(place) < num_users:
        raise ValueError(
            f"place {int(place)} of {num_users} users: places are 0 to {num_users - 1}, and "
            "`start` makes as many as there may ever be users"
        )


def _check_alike(like: Any, tree: Any, what: str, *, dtypes: bool = False) -> None:
    """An array of another shape would be broadcast, such as one number over a whole table."""
    expected, found = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(each)}
        for each in (like, tree)
    )
    for leaf in [*expected, *found]:
        if leaf not in expected or leaf not in found:
            lack = "lacks" if leaf in expected else "has in excess"
            raise ValueError(f"{what} {lack} {leaf}: give a tree of the same structure")
        wanted, got = jnp.shape(expected[leaf]), jnp.shape(found[leaf])
        if wanted != got:
            raise ValueError(f"{what} has at {leaf} the shape {got}, where {wanted} is needed")
        if dtypes and expected[leaf].dtype != found[leaf].dtype:
            raise ValueError(
                f"{what} has at {leaf} the dtype {found[leaf].dtype}, where "
                f"{expected[leaf].dtype} is needed"
            )


def place_of(names: Sequence[str], name: str) -> int:
    """Where a user is along the leading axis.

    Args:
      names: of all users, in the order of their places.
      name: of one.

    Returns:
      the place.

    Raises:
      ValueError: nobody, or more than one, has the name.
    """
    count = list(names).count(name)
    if not count:
        raise ValueError(
            f"nobody is called {name!r} among {', '.join(names)}: name a free place with it"
        )
    if count > 1:
        raise ValueError(
            f"user {name!r} has {count} places among {', '.join(names)}: give every place a name "
            "of its own"
        )
    return list(names).index(name)


def together(step: Step) -> Step:
    """The step of one user as a step of all of them, each with their own state and data.

    A user who is not wanted keeps their state to the last bit: no moment of an optimiser decays and
    no key advances. On a mesh each device trains its own users, see `sharding.per_device`.

    Args:
      step: `(state, own, *shared) -> (state, metrics)`, pure.

    Returns:
      `(states, wanted [N] bool, own, *shared) -> (states, metrics [N])`, where arrays of `states`
      and `own` are [N, …] and those of `shared` the same for all; the metrics of who is not wanted
      say nothing. It raises a ValueError where leading axes differ, or where the step returns a
      state of another structure or of other shapes.
    """

    def of_all(states: Any, wanted: Array, own: Any, *shared: Any) -> tuple[Any, dict[str, Array]]:
        chex.assert_rank(wanted, 1)
        chex.assert_type(wanted, bool)
        for name, tree in (("the states", states), ("the data", own)):
            sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(tree)} - {wanted.shape}
            if sizes:
                raise ValueError(
                    f"`wanted` is of {len(wanted)} users, but {name} have arrays with a leading "
                    f"axis of {sorted(sizes)}: stack one entry a user"
                )

        def of_one(
            state: Any, wanted: Array, own: Any, shared: Any
        ) -> tuple[Any, dict[str, Array]]:
            new, metrics = step(state, own, *shared)
            _check_alike(state, new, "the state that the step returns")
            return jax.tree.map(partial(jnp.where, wanted), new, state), metrics

        def of_device(
            shared: Any, states: Any, wanted: Array, own: Any
        ) -> tuple[Any, dict[str, Array]]:
            return jax.vmap(of_one, (0, 0, 0, None))(states, wanted, own, shared)

        return sharding.per_device(of_device)(shared, states, wanted, own)

    return of_all


def batches(
    feedback: Mapping[str, PreferenceBatch],
    names: Sequence[str],
    *,
    num_pairs: int,
    vocab_size: int,
) -> PreferenceBatch:
    """What users said, in one batch: B pairs each, of which those that a user lacks are none.

    Args:
      feedback: of each user who said something, any number of pairs up to B, of the same lengths.
      names: of all users, in the order of their places.
      num_pairs: B.
      vocab_size: V.

    Returns:
      a `PreferenceBatch` of NumPy arrays [N, B, …], tokens int32, masks bool and probabilities
      float32; `batch.pairs.any(1)` are the users with anything to learn from.

    Raises:
      ValueError: with the user's name and what is wrong: a name that is not there or there twice,
        what is no `PreferenceBatch`, columns of other shapes or dtypes than its own, too many
        pairs, other lengths than those of the user before, a token that is not in the vocabulary
        (under a mask it becomes 0), `chosen_probs` that are no probabilities or that some have and
        others have not.
    """
    if not feedback:
        raise ValueError(f"none of the {len(names)} users has said anything")
    rows: dict[int, dict[str, np.ndarray]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, batch in feedback.items():
        place = place_of(names, name)
        columns = _columns(name, batch)
        columns = _checked(name, columns, num_pairs=num_pairs, vocab_size=vocab_size)
        own = {column: x.shape[1:] for column, x in columns.items()}
        sizes = sizes or own
        if ("chosen_probs" in own) != ("chosen_probs" in sizes):
            has, before = ("has", "have not") if "chosen_probs" in own else ("has no", "have")
            raise ValueError(
                f"user {name!r} {has} chosen_probs, and those before {before}: give them to all, "
                "1 where a user is certain, or to nobody"
            )
        if own != sizes:
            raise ValueError(
                f"user {name!r}: the columns of a pair have the sizes {own}, those of the user "
                f"before {sizes}: pad all users' feedback alike"
            )
        rows[place] = columns

    def stacked(name: str) -> Any:
        some = next(iter(rows.values()))[name]
        whole = np.zeros((len(names), num_pairs, *some.shape[1:]), some.dtype)
        for place, columns in rows.items():
            whole[place, : len(columns[name])] = columns[name]
        return whole

    return PreferenceBatch(**{name: stacked(name) for name in sizes})


def _columns(name: str, batch: PreferenceBatch) -> dict[str, np.ndarray]:
    """What a user said, each column of the shape and kind that it has to be."""
    if not isinstance(batch, PreferenceBatch):
        raise ValueError(
            f"user {name!r}: feedback is a PreferenceBatch, not a {type(batch).__name__}; "
            "`compared` makes one of two rollouts"
        )
    columns = {
        field.name: np.asarray(getattr(batch, field.name))
        for field in fields(batch)
        if getattr(batch, field.name) is not None
    }
    if columns["chosen"].ndim != 2 or columns["prompts"].ndim != 2:
        raise ValueError(
            f"user {name!r}: chosen and prompts have the shapes {columns['chosen'].shape} and "
            f"{columns['prompts'].shape}, where [B, T] and [B, P] are needed, of one pair too"
        )
    size = columns["chosen"].shape
    shapes = dict.fromkeys(columns, size) | {"chosen_probs": size[:1]}
    shapes |= dict.fromkeys(("prompts", "prompt_mask"), (size[0], columns["prompts"].shape[1]))
    for column, x in columns.items():
        if x.shape != shapes[column]:
            raise ValueError(
                f"user {name!r}: {column} has the shape {x.shape}, but where chosen is {size} it "
                f"has to be {shapes[column]}"
            )
        needed = "integers" if column in MASKS else "bool"
        needed = "numbers" if column == "chosen_probs" else needed
        if not any(jnp.issubdtype(x.dtype, kind) for kind in _KINDS[needed]):
            raise ValueError(f"user {name!r}: {column} has to be {needed}, and is {x.dtype}")
    return columns


def _checked(
    name: str,
    columns: Mapping[str, np.ndarray],
    *,
    num_pairs: int,
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The columns as all users have them, each token in the vocabulary: a model looks it up."""
    pairs = np.asarray(columns["chosen_mask"].any(1) & columns["rejected_mask"].any(1))
    if len(pairs) > num_pairs:
        raise ValueError(
            f"user {name!r} has {len(pairs)} pairs, and there is room for {num_pairs}: raise "
            "num_pairs, or give them in several batches"
        )
    found = dict(columns)
    for column, mask in MASKS.items():
        tokens = columns[column]
        unknown = (tokens < 0) | (tokens >= vocab_size)
        found[column] = np.where(unknown, 0, tokens).astype(np.int32)
        unknown &= columns[mask]
        if unknown.any():
            row, position = np.argwhere(unknown)[0]
            raise ValueError(
                f"user {name!r}: {column} of pair {row} has token {tokens[row, position]} at "
                f"position {position}, but the model's vocabulary has {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}: encode texts with the model's own tokenizer"
            )
    probs = columns.get("chosen_probs", np.ones(len(pairs)))
    wrong = np.flatnonzero(pairs & ~((probs >= 0) & (probs <= 1)))
    if len(wrong):
        raise ValueError(
            f"user {name!r}: chosen_probs of pair {wrong[0]} is {probs[wrong[0]]}: give a "
            "probability between 0 and 1"
        )
    if "chosen_probs" in found:
        found["chosen_probs"] = probs.astype(np.float32)
    return found


def compared(first: Rollout, second: Rollout, first_wins: Array) -> PreferenceBatch:
    """Pairs of responses to the same prompts, in the order that a user gave them.

    Of episodes of several turns give `Episodes.with_observations`, see `stages.soft_pairs`.

    Args:
      first: B responses.
      second: B responses to the same prompts.
      first_wins: [B] bool, whether the user prefers the first of a pair.

    Returns:
      a `PreferenceBatch` of B pairs.

    Raises:
      AssertionError: shapes differ or `first_wins` is not bool.
    """
    chex.assert_type(first_wins, bool)
    batch = stages.soft_pairs(first, second, jnp.asarray(first_wins, jnp.float32))
    return replace(batch, chosen_probs=None)


def no_pairs(like: PreferenceBatch, *, num_pairs: int) -> PreferenceBatch:
    """Room for a user's pairs: rows that are none, until `remember` fills them.

    Args:
      like: pairs, or their shapes.
      num_pairs: M.

    Returns:
      a `PreferenceBatch` of M rows that count nowhere.
    """

    def room(x: Array) -> Array:
        return jnp.zeros((num_pairs, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(room, like)


def remember(store: PreferenceBatch, new: PreferenceBatch, at: int | Array) -> PreferenceBatch:
    """Pairs written behind those of the rounds before.

    Args:
      store: M rows, see `no_pairs`.
      new: B pairs.
      at: where the first of them goes. What would come behind the last row is left out, and what
        would come before row 0.

    Returns:
      the store.

    Raises:
      ValueError: pairs of other lengths than those of the store, or other columns.
    """
    num = len(new.prompts)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype), store)
    _check_alike(like, new, "what is to be remembered")
    rows = at + jnp.arange(num)
    rows = jnp.where(rows < 0, len(store.prompts), rows)  # Negative ones would count from the end.
    return jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), store, new)


def recall(key: Array, store: PreferenceBatch, *, num_pairs: int) -> PreferenceBatch:
    """A minibatch of what a user ever said, drawn with replacement from the rows that are pairs.

    Args:
      key: a typed key; consumed.
      store: M rows.
      num_pairs: B.

    Returns:
      B pairs; where the store has none, B rows that count nowhere.
    """
    logits = jnp.where(store.pairs, 0.0, -jnp.inf)
    rows = jax.random.categorical(key, logits, shape=(num_pairs,))
    return jax.tree.map(lambda x: x[rows], store)


def head_of(shared: Params, vector: Array) -> Params:
    """The linear head of a user, w + U·e: score = (w + U·e)·h + b.

    Args:
      shared: `{"kernel": [D], "bias": []}` of a `linear_head`, w and b, with `"directions"` [D, K],
        U. Where U is trained too it must not begin at 0, or neither it nor e ever moves.
      vector: [K], e; 0 is the shared head.

    Returns:
      parameters of a `linear_head`.

    Raises:
      AssertionError: the vector's size is not that of the directions.
    """
    width, size = shared["directions"].shape
    chex.assert_shape([shared["kernel"], vector], [(width,), (size,)])
    return {"kernel": shared["kernel"] + shared["directions"] @ vector, "bias": shared["bias"]}


def embedded(scorer: ScalarModel, shared: Params) -> ScalarModel:
    """The reward model as a function of a user's vector alone.

    It closes over what is shared: make it inside of the function that is compiled, see `lora.on`.

    Args:
      scorer: a `scalar_model` with a `linear_head`.
      shared: its parameters, `"directions"` [D, K] among those of its head, see `head_of`.

    Returns:
      a `ScalarModel` whose parameters are the vector [K], 0 to begin with.
    """

    def init(key: Array) -> Params:
        return jnp.zeros(shared["head"]["directions"].shape[1])

    def values(vector: Params, *args: Any, **kwargs: Any) -> Array:
        own = {**shared, "head": head_of(shared["head"], vector)}
        return scorer.values(own, *args, **kwargs)

    return scorer._replace(init=init, values=values)


def added(params: Params, vector: Array, *, table: str) -> Params:
    """Parameters with a user's vector added to every row of a table.

    Of the embedding of positions it is a word about the user that the model reads at every token.

    Args:
      params: of the model, nested dictionaries.
      vector: [D]; 0 is the shared model.
      table: the path of a table [L, D], such as "position_embedding/embedding".

    Returns:
      parameters of the same structure; as `combine` of `lora.on`, with `table` bound, it makes the
      vector the parameters.

    Raises:
      ValueError: there is no such table.
    """
    found = False

    def add(path: Any, x: Array) -> Array:
        nonlocal found
        if jax.tree_util.keystr(path, simple=True, separator="/") != table:
            return x
        found = True
        chex.assert_shape(x, (None, *vector.shape))
        return (x + vector).astype(x.dtype)

    params = jax.tree_util.tree_map_with_path(add, params)
    if not found:
        raise ValueError(f"the parameters have no table {table!r} for a user's vector")
    return params
