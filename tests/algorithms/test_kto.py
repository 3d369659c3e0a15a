"""KTO from single responses: by a loop in NumPy, what it must not read, and that pairs are such."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, chosen, left_padded, log_softmax

from rlhfjax.algorithms import kto
from rlhfjax.types import LabelledBatch, PreferenceBatch

V, B, K, P, T = 7, 5, 2, 3, 4
MODEL = bigram(V)
PARAMS, REF = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
HYPER = kto.Hyperparameters(0.6, 1.5, 0.7)
RNG = np.random.default_rng(0)
RESPONSES = RNG.integers(0, V, (B, K, T)).astype(np.int32)
# The second row has no response at all, three others have one.
MASK = np.arange(T) < np.array([[4, 0], [0, 0], [2, 3], [1, 0], [0, 4]])[..., None]
LABELS = np.array([[True, True], [True, False], [False, True], [False, True], [True, True]])
BATCH = LabelledBatch(*left_padded(RNG, [3, 1, 2, 3, 1], P, 0, V), RESPONSES, MASK, LABELS)
ROWS = [0, 2, 3, 4]


class Response(NamedTuple):
    """What a response adds up to, after its own prompt and after that of the next row."""

    desirable: bool
    now: float
    ref: float
    mismatched: float


def responses() -> list[Response]:
    def log_prob(params: Any, prompt: int, tokens: np.ndarray) -> float:
        before = np.concatenate([BATCH.prompts[prompt, -1:], tokens[:-1]])
        return float(chosen(log_softmax(params["table"])[before], tokens).sum())

    found = []
    for row, following in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True):
        for k in range(K):
            tokens = RESPONSES[row, k][MASK[row, k]]
            if len(tokens):
                now, ref = (log_prob(p, row, tokens) for p in (PARAMS, REF))
                apart = log_prob(PARAMS, following, tokens) - log_prob(REF, following, tokens)
                found.append(Response(bool(LABELS[row, k]), now, ref, apart))
    return found


@jax.jit
def measure(batch: Any) -> Any:
    """((loss, metrics), gradient)."""
    of = jax.value_and_grad(lambda *args: kto.loss(*args, model=MODEL), has_aux=True)
    return of(PARAMS, batch, REF, HYPER)


def test_the_loss_and_its_metrics_are_those_of_a_loop_over_responses() -> None:
    found = responses()
    assert [r.desirable for r in found] == [True, False, True, False, True]
    z = max(0.0, np.mean([r.mismatched for r in found]))
    assert z > 0.1
    losses = []
    for r in found:
        gain = HYPER.beta * (r.now - r.ref - z)
        losses.append(1.5 / (1 + np.exp(gain)) if r.desirable else 0.7 / (1 + np.exp(-gain)))
    good, bad = ([r for r in found if r.desirable is side] for side in (True, False))
    rewards = [np.mean([HYPER.beta * (r.now - r.ref) for r in side]) for side in (good, bad)]
    expected = {
        "kl": z,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": np.mean([r.now for r in good]),
        "logps/rejected": np.mean([r.now for r in bad]),
    }
    (loss, metrics), _ = measure(BATCH)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_z_is_that_of_trl_which_moves_the_completions_of_a_batch_by_one() -> None:
    single = LabelledBatch(
        BATCH.prompts, BATCH.prompt_mask, RESPONSES[:, :1], np.ones((B, 1, T), bool), LABELS[:, :1]
    )
    moved = np.concatenate([RESPONSES[-1:, 0], RESPONSES[:-1, 0]])
    apart = []
    for prompt, completion in zip(BATCH.prompts, moved, strict=True):
        before = np.concatenate([prompt[-1:], completion[:-1]])
        tables = (log_softmax(params["table"])[before] for params in (PARAMS, REF))
        now, ref = (chosen(table, completion).sum() for table in tables)
        apart.append(now - ref)
    (_, metrics), _ = measure(single)
    assert np.mean(apart) > 0.1
    assert metrics["kl"] == pytest.approx(np.mean(apart), rel=1e-5)


def test_a_label_may_be_a_probability() -> None:
    def loss(label: float) -> float:
        labels = LABELS.astype(np.float32)
        labels[2, 1] = label
        return float(measure(replace(BATCH, labels=labels))[0][0])

    assert loss(1.0) != loss(0.0)
    for label in (0.3, 0.8):
        assert loss(label) == pytest.approx(label * loss(1) + (1 - label) * loss(0), rel=1e-5)


def test_what_is_no_response_is_not_read_to_the_last_bit() -> None:
    batch = replace(BATCH, labels=LABELS.astype(np.float32))
    polluted = replace(
        batch,
        prompts=np.where(BATCH.prompt_mask & MASK.any((1, 2))[:, None], BATCH.prompts, 6),
        responses=np.where(MASK, RESPONSES, 6),
        labels=np.where(MASK.any(2), batch.labels, np.nan),
    )
    assert (polluted.responses != RESPONSES).any()
    assert (polluted.prompts[1] != BATCH.prompts[1]).any()
    assert_same(measure(polluted), measure(batch))


def test_a_batch_without_a_response_teaches_nothing() -> None:
    (loss, metrics), grads = measure(replace(BATCH, response_mask=np.zeros_like(MASK)))
    assert loss == 0.0
    assert not grads["table"].any()
    assert all(np.isfinite(x) for x in metrics.values())


def test_pairs_are_the_chosen_and_then_the_rejected_ones_one_by_one() -> None:
    lengths = np.array([[4, 3], [2, 0], [1, 4], [3, 1], [0, 0]])
    masks = np.arange(T) < lengths[..., None]
    sides = [x[:, k] for k in range(K) for x in (RESPONSES, masks)]
    pairs = PreferenceBatch(BATCH.prompts, BATCH.prompt_mask, *sides)
    real = [0, 2, 3]
    single = LabelledBatch(
        *(np.tile(x[real], (2, 1)) for x in (BATCH.prompts, BATCH.prompt_mask)),
        *(np.concatenate([x[real, 0], x[real, 1]])[:, None] for x in (RESPONSES, masks)),
        np.repeat([True, False], 3)[:, None],
    )
    assert_close(measure(pairs), measure(single), atol=1e-6)


def test_a_step_in_micro_batches_is_a_descent_along_the_gradient() -> None:
    optimizer = optax.sgd(0.1)
    step = kto.make_step(MODEL, optimizer, num_micro_batches=5)
    after, metrics = step(kto.init(PARAMS, optimizer), BATCH, REF, HYPER)
    (loss, measured), grads = measure(BATCH)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads), atol=1e-6)
    assert_close(metrics, measured | {"loss": loss, "val/num_skipped": 0}, atol=1e-6)


def test_steps_raise_what_is_desirable_and_lower_what_is_not() -> None:
    optimizer = optax.sgd(1.0)
    step, state = kto.make_step(MODEL, optimizer), kto.init(REF, optimizer)
    for _ in range(30):
        state, metrics = step(state, BATCH, REF, HYPER)
    assert metrics["rewards/chosen"] > 0.1
    assert metrics["rewards/rejected"] < -0.1
