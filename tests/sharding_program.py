"""Algorithms on eight virtual devices; prints what `test_sharding.py` reads, as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu PYTHONPATH=.:tests \\
        python tests/sharding_program.py [--everything]

Each algorithm runs without a mesh and on meshes, from the same key; so does what acts and what
gives feedback. `--everything` runs all of them on all meshes, which takes some ten minutes.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from small_models import bigram, left_padded, recurrent, scattered

from rlhfjax import models, rollout, sampling, sharding
from rlhfjax.algorithms import (
    cispo,
    cpo,
    dapo,
    dpo,
    dr_grpo,
    grpo,
    gspo,
    ipo,
    iteration,
    kto,
    online_dpo,
    orpo,
    ppo,
    reinforce,
    reinforce_plus_plus,
    rejection_sampling,
    remax,
    reward_model,
    rloo,
    sft,
    simpo,
)
from rlhfjax.feedback import judgement, people, stages, templates
from rlhfjax.types import LanguageModel, PreferenceBatch, Rollout

MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8)}
ITERATIONS = 5
V, WIDTH, B, P, T, PAD, END = 32, 16, 16, 4, 6, 0, 2
DECODER = models.decoder(models.DecoderConfig(V, P + T, WIDTH, num_layers=1, num_heads=8))
HEAD = models.linear_head(WIDTH, stddev=0.3)
TABLE = bigram(V)
# A large epsilon, so that Adam does not turn rounding of tiny gradients into steps.
OPTIMIZER = optax.adam(1e-2, eps=1e-3)

RNG = np.random.default_rng(0)
PROMPTS = left_padded(RNG, [1 + i % P for i in range(B)], P, 3, V)
CHOSEN, REJECTED = RNG.integers(0, V, (2, B, T)).astype(np.int32)
# Devices hold different numbers of tokens, and some hold none.
LENGTHS = np.array([T, 1, 3, 2] + [0] * 8 + [1, 2, 0, 5])[:, None]
PAIRS = PreferenceBatch(
    *PROMPTS, CHOSEN, np.arange(T) < LENGTHS, REJECTED, np.arange(T) < LENGTHS[::-1]
)
# All tokens that count are in the first two rows.
COUNTED = (np.arange(P + T) > 2) & (np.arange(B) < 2)[:, None]
TEXTS = np.concatenate([PROMPTS[0], CHOSEN], 1), COUNTED, np.ones((B, P + T), bool)
# Unlike what would be inferred, and the moments unlike the parameters.
RULES = [
    ("params/.*qkv/kernel", PartitionSpec(None, ("data", "tensor"))),
    ("opt_state/.*/mu/(.*/)?embedding/embedding", PartitionSpec("data")),
]


def reward(weight: jax.Array, samples: Rollout) -> jax.Array:
    """Counts tokens; the second pair of rows, which may be all that a device has, has no score."""
    count = ((samples.responses % 3 == 0) & samples.response_mask).sum(1)
    return jnp.where(jnp.arange(len(count)) // 2 == 1, jnp.nan, weight * count)


def often_ends(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """On some devices all rows end long before those of others."""
    return sampling.categorical(logits.at[:, END].add(2.0), uniform)


def near(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Likely tokens near u·V: hangs on the key too, and is compiled in less time."""
    return jnp.argmax(logits - jnp.abs(jnp.arange(V) - V * uniform[:, None]), axis=-1)


def shown(learn: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the sampled tokens among the metrics."""

    def learn_and_show(state: Any, samples: Rollout, *args: Any, **kwargs: Any) -> Any:
        state, metrics = learn(state, samples, *args, **kwargs)
        return state, metrics | {"tokens": samples.tokens}

    return learn_and_show


class Case(NamedTuple):
    """An algorithm: its first state, its step, and what the step takes behind the state."""

    start: Callable[[jax.Array], Any]
    step: Callable[..., Any]
    batch: tuple[Any, ...]
    whole: tuple[Any, ...] = ()
    numbers: tuple[Any, ...] = ()
    rules: sharding.Rules = ()


def reference(model: Any) -> Any:
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(7)))


def online(module: ModuleType, model: Any, num_prompts: int, *, rules: Any = (), **sizes: Any):
    config = module.Config(
        T, PAD, END, num_epochs=1, num_minibatches=2, sampler=often_ends, **sizes
    )
    policy = model.policy if module is ppo else model
    start = {"kl_coef": 0.1} if module is ppo else {}
    make_step = module.make_step
    if module is not dapo:
        of = {"policy_of": lambda pair: pair.policy} if module is ppo else {}
        make_step, _ = iteration.makers(module.sample, shown(module.learn), **of)
    return Case(
        lambda key: module.init(model.init(key), OPTIMIZER, key, **start),
        make_step(model, reward, OPTIMIZER, config),
        tuple(x[:num_prompts] for x in PROMPTS),
        (reference(policy), np.float32(1.0)),
        (module.Hyperparameters(),),
        rules,
    )


def offline(module: ModuleType, model: Any, batch: Any, *rest: Any) -> Case:
    ref = (reference(model),) if module in (dpo, ipo, kto) else (None,) if rest else ()
    return Case(
        lambda key: module.init(model.init(key), OPTIMIZER),
        module.make_step(model, OPTIMIZER),
        batch,
        ref,
        rest,
    )


CASES: dict[str, Callable[[], Case]] = {
    "ppo": lambda: online(ppo, models.shared_trunk(DECODER, HEAD), B),
    "grpo": lambda: online(grpo, DECODER, 6, group_size=2, rules=RULES),
    "sft": lambda: offline(sft, DECODER, TEXTS),
    "reward_model": lambda: offline(reward_model, models.scalar_model(DECODER, HEAD), (PAIRS,)),
    "dpo": lambda: offline(dpo, DECODER, (PAIRS,), dpo.Hyperparameters()),
    # A pair of rows on two devices, and rows that do not divide over eight devices.
    "remax": lambda: online(remax, TABLE, 4),
    "online_dpo": lambda: online(online_dpo, TABLE, 6),
    "dapo": lambda: online(dapo, TABLE, 16, group_size=2, num_rounds=2),
}
OTHERS: dict[str, Callable[[], Case]] = {
    module.__name__.rpartition(".")[2]: make
    for modules, make_of in (
        (
            (reinforce, rloo, reinforce_plus_plus, cispo, gspo, dr_grpo, rejection_sampling),
            lambda module: lambda: online(module, TABLE, 8, group_size=2),
        ),
        (
            (ipo, kto, cpo, orpo, simpo),
            lambda module: lambda: offline(module, TABLE, (PAIRS,), module.Hyperparameters()),
        ),
    )
    for module in modules
    for make in (make_of(module),)
}
SUITE = {
    "ppo": list(MESHES),
    "grpo": ["2x2x2"],
    "sft": ["8x1x1"],
    "reward_model": ["1x8x1"],
    "dpo": ["1x1x8"],
    "remax": ["8x1x1"],
    "online_dpo": ["2x2x2"],
    "dapo": ["2x2x2"],
}


class Run(NamedTuple):
    """What became of an algorithm."""

    metrics: list[dict[str, float]]
    tokens: list[np.ndarray]
    params: Any
    facts: dict[str, Any]


COMPILED: list[str] = []


def run(case: Case, mesh: Mesh | None) -> Run:
    key, batch, whole = jax.random.key(0), case.batch, case.whole
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        if mesh is None:
            state = jax.jit(case.start)(key)
        else:
            state = sharding.init(case.start, mesh, case.rules)(key)
            batch, whole = sharding.rows(batch, mesh), sharding.put(whole, mesh)
        places = jax.tree.map(lambda x: x.sharding, state)
        arguments = (*batch, *whole, *case.numbers)
        program = case.step.lower(state, *arguments).compile()
        facts = {
            "flops": program.cost_analysis()["flops"],
            "params": share(state.params),
            "opt_state": share(state.opt_state),
            "in_decoding": collectives_in(program.as_text(), "decode"),
            "in_training": collectives_in(program.as_text(), "transpose"),
        }
        metrics, tokens = [], []
        for number in range(ITERATIONS):
            if number == 1:
                COMPILED.clear()
            state, measured = case.step(state, *arguments)
            tokens.append(np.asarray(measured.pop("tokens", 0)))
            metrics.append({name: float(x) for name, x in measured.items()})
        facts["compiled_again"] = len(COMPILED)
        facts["moved_arrays"] = [
            jax.tree_util.keystr(path)
            for (path, before), after in zip(
                jax.tree.leaves_with_path(places), jax.tree.leaves(state), strict=True
            )
            if before != after.sharding
        ]
        return Run(metrics, tokens, jax.tree.map(np.asarray, state.params), facts)


def share(tree: Any) -> float:
    """The part of a tree that lies on the first device."""
    leaves = jax.tree.leaves(tree)
    here = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    return here / sum(x.nbytes for x in leaves)


COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|send|recv)(-start)?\("
)
CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w*computations?)=\{?((?:%[\w.\-]+,? ?)+)")


def collectives_in(program: str, name: str) -> int | None:
    """Collectives in the loops that compute something called `name`; None: there is no such loop.

    Args:
      program: the text of a compiled program.
      name: part of the name that JAX gave to an operation.
    """
    computations: dict[str, list[str]] = {}
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computations[head[1]] = lines = []
        elif line.startswith("  "):
            lines.append(line)

    def reached(line: str) -> Iterator[str]:
        """The lines of all that a line calls, and of all that those call."""
        for names in CALLED.findall(line):
            for called in re.findall(r"%([\w.\-]+)", names):
                for inner in computations[called]:
                    yield inner
                    yield from reached(inner)

    loops = [
        list(reached(line))
        for lines in computations.values()
        for line in lines
        if re.search(r" while\(", line)
    ]
    meant = [loop for loop in loops if any(re.search(rf'op_name="[^"]*{name}', x) for x in loop)]
    return sum(bool(COLLECTIVE.search(x)) for loop in meant for x in loop) if meant else None


def farthest(left: Any, right: Any) -> float:
    """The largest |a - b| / (1 + |b|) of two trees of numbers."""
    apart = jax.tree.map(lambda a, b: np.max(np.abs(a - b) / (1 + np.abs(b))), left, right)
    return float(np.max(jax.tree.leaves(apart)))  # NaN if any is


def compare(case: Case, meshes: list[str]) -> dict[str, Any]:
    alone, found = run(case, None), {}
    start = jax.tree.map(np.asarray, jax.jit(case.start)(jax.random.key(0)).params)
    for name in meshes:
        data, fsdp, tensor = MESHES[name]
        spread = run(case, sharding.mesh(data=data, fsdp=fsdp, tensor=tensor))
        found[name] = spread.facts | {
            "metrics": farthest(spread.metrics, alone.metrics),
            "parameters": farthest(spread.params, alone.params),
            "learned": farthest(alone.params, start),
            "tokens": bool(np.array_equal(spread.tokens, alone.tokens)),
            "flops": spread.facts["flops"] / alone.facts["flops"],
        }
    return found


class Call(NamedTuple):
    """What acts or gives feedback, `(whole, *rows) -> result`, and its arguments."""

    function: Callable[..., Any]
    whole: Any
    rows: tuple[Any, ...]


def acting(model: LanguageModel) -> Call:
    """Episodes of one to three turns: a device may be done long before its neighbour."""

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = (jax.random.key_data(key)[1] % 20).astype(jnp.int32)
        return number, jnp.where(jnp.arange(P) <= number % P, 3 + number, -1)

    def step(total: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
        total = total + jnp.maximum(tokens, 0).sum()
        said = jnp.array([3, -1]) + total % 4
        return total, said, (total % 5).astype(jnp.float32), total % 3 == 0

    def act(whole: Any, reset_keys: jax.Array) -> rollout.Episodes:
        return rollout.act(
            model, whole["params"], rollout.Environment(reset, step), reset_keys, whole["key"],
            num_turns=3, num_tokens=2, pad_token=PAD, end_token=END, sampler=near,
        )  # fmt: skip

    keys = jax.random.split(jax.random.key(2), B)
    return Call(act, {"params": scattered(model, seed=1), "key": jax.random.key(3)}, (keys,))


def template(*parts: list[int] | str) -> templates.Template:
    """Tokens and, between them, the names of blanks."""
    tokens = tuple(np.array(part, np.int32) for part in parts[::2])
    masks = tuple(np.ones(x.shape, bool) for x in tokens)
    return templates.Template(tokens, masks, parts[1::2])


def comparing(model: LanguageModel) -> Call:
    """Each pair by one of two principles, whose answers have one token and two."""
    mask = np.array([[True, False], [True, True]])
    texts = template([7], "first", [8, 9], "second", [3]), template([], "first", [5], "second", [4])
    answers = np.array([[3, 0], [4, 5]]), np.array([[9, 0], [2, 2]])
    questions = [templates.Question(*asked, mask) for asked in zip(texts, answers, strict=True)]

    def compare(params: Any, index: jax.Array, first: Any, second: Any) -> Any:
        asked = templates.select_question(questions, index)
        return judgement.compare(model, params, asked, first, second)

    index = np.arange(B, dtype=np.int32) % 2
    first, second = (PAIRS.chosen, PAIRS.chosen_mask), (PAIRS.rejected, PAIRS.rejected_mask)
    return Call(compare, scattered(model, seed=1), (index, first, second))


def learning(model: LanguageModel) -> Call:
    """Eight users with an adapter and a head each; some have said nothing and stay as they are."""
    base = scattered(model, seed=1)
    head, optimizer = models.linear_head(V, stddev=1.0), optax.sgd(0.1)

    def start(key: jax.Array) -> Any:
        adapters = models.lora.init(key, base, rank=2, pattern="table|qkv")
        shared = reward_model.init({"backbone": adapters, "head": head.init(key)}, optimizer)
        return people.start(shared, num_users=8)

    def step(state: Any, batch: PreferenceBatch, base: Any) -> Any:
        combine = partial(models.lora.merge, scale=1.0)
        scorer = models.scalar_model(models.lora.on(model, base, combine=combine), head)
        return reward_model.make_step(scorer, optimizer)(state, batch)

    def learn(base: Any, states: Any, own: PreferenceBatch) -> Any:
        return people.together(step)(states, own.pairs.any(1), own, base)[0].params

    rng = np.random.default_rng(1)
    states = jax.tree.map(
        lambda x: np.abs(rng.normal(0.0, 0.3, x.shape)).astype(x.dtype),
        jax.eval_shape(start, jax.random.key(0)),
    )
    own = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), PAIRS)
    return Call(learn, base, (states, own))


def revising(model: LanguageModel) -> Call:
    critique = template([7], "response", [])
    revision = template([9], "response", [8], "critique", [])

    def revise(params: Any, response: Any) -> stages.Revisions:
        return stages.revise(
            model, params, critique, revision, {"response": response}, jax.random.key(0),
            num_tokens=3, pad_token=PAD, end_token=END, sampler=sampling.greedy,
        )  # fmt: skip

    return Call(revise, scattered(model, seed=1), ((PAIRS.chosen, PAIRS.chosen_mask),))


# All of one width, that of the table. What reads only the last token is compiled in less time.
READER = recurrent(V, V)
FUNCTIONS = {acting: READER, comparing: READER, learning: TABLE, revising: TABLE}
TRANSFORMER = models.decoder(models.DecoderConfig(V, 24, width=V, num_layers=1, num_heads=8))


def functions(
    model_of: dict[Callable[[LanguageModel], Call], LanguageModel], meshes: list[str]
) -> dict[str, Any]:
    """What acts and what gives feedback, alone and on meshes."""

    def numbers(result: Any, kinds: str) -> list[np.ndarray]:
        return [x for x in jax.tree.leaves(jax.device_get(result)) if x.dtype.kind in kinds]

    found: dict[str, Any] = {}
    for make, model in model_of.items():
        call = make(model)
        alone = jax.jit(call.function)(call.whole, *call.rows)
        found[make.__name__] = by_mesh = {}
        for name in meshes:
            data, fsdp, tensor = MESHES[name]
            mesh = sharding.mesh(data=data, fsdp=fsdp, tensor=tensor)
            with jax.set_mesh(mesh):
                given = sharding.put(call.whole, mesh), *sharding.rows(call.rows, mesh)
                spread = jax.jit(call.function)(*given)
            by_mesh[name] = {
                "tokens": all(map(np.array_equal, numbers(spread, "bi"), numbers(alone, "bi"))),
                "numbers": farthest(numbers(spread, "f"), numbers(alone, "f")),
                "different": min(len(np.unique(x, axis=0)) for x in numbers(alone, "f")),
            }
    return found


def layouts() -> dict[str, Any]:
    """How batches and arrays come to lie on devices, and what is refused."""
    mesh = sharding.mesh(data=4, fsdp=2)
    numbers = np.arange(24.0, dtype=np.float32).reshape(24, 1)
    placed = {rows: sharding.rows(numbers[:rows], mesh) for rows in (24, 12, 6, 3)}
    key = sharding.put(jax.random.key(3), mesh)
    with jax.set_mesh(mesh):
        doubled = jax.jit(lambda x: sharding.whole(2 * sharding.split_rows(x)))(numbers)
        numbered = jax.jit(sharding.per_device(lambda _, x: sharding.row_numbers(len(x)) + 0 * x))
        row_numbers = numbered((), np.zeros(24, np.int32))
    try:
        sharding.rows_of_process(numbers[:12], mesh)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "rows_per_device": {
            rows: x.addressable_shards[0].data.shape[0] for rows, x in placed.items()
        },
        "same_values": all(np.array_equal(x, numbers[:rows]) for rows, x in placed.items()),
        "of_process": np.array_equal(sharding.rows_of_process(numbers, mesh), numbers),
        "part": sharding.part_of_process(mesh),
        "key": bool((jax.random.key_data(key) == jax.random.key_data(jax.random.key(3))).all()),
        "whole": doubled.is_fully_replicated and np.array_equal(doubled, 2 * numbers),
        "row_numbers": np.asarray(row_numbers).tolist(),
        "refused": refused,
    }


if __name__ == "__main__":
    assert jax.device_count() == 8
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: COMPILED.append(event) if "backend_compile" in event else None
    )
    chosen = {name: list(MESHES) for name in CASES | OTHERS} if sys.argv[1:] else SUITE
    found = {name: compare((CASES | OTHERS)[name](), chosen[name]) for name in chosen}
    widely = dict.fromkeys(FUNCTIONS, TRANSFORMER), list(MESHES)
    found["functions"] = functions(*widely if sys.argv[1:] else (FUNCTIONS, ["2x2x2"]))
    print(json.dumps(found | {"layouts": layouts()}))
