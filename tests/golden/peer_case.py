"""A case of `golden.json` as arrays, and the conventions that several functions of a peer share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import advantages, kl, masked
from rlhfjax.losses import reductions

Given = dict[str, Any]
BIASED = {"halos", "sff-details", "lmhp-openai", "lmhp-details", "alpaca_farm", "openrlhf"}
NON_FINITE = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


@dataclass(frozen=True)
class Case:
    """One call of one peer: arrays are float32, int32 or, for masks, bool."""

    id: str
    function: str
    peer: str
    convention: str
    source: str
    tags: tuple[str, ...]
    inputs: dict[str, Any]
    expected: dict[str, Any]

    def __str__(self) -> str:
        return self.id


def decode(case: dict[str, Any]) -> Case:
    """A case of the file with its numbers as arrays."""
    return Case(
        id=case.get("id", ""),
        function=case["function"],
        peer=case["peer"],
        convention=case.get("convention") or "",
        source=case.get("source") or "",
        tags=tuple(case.get("tags") or ()),
        inputs={name: _array(name, entry) for name, entry in case["inputs"].items()},
        expected={name: _array(name, entry) for name, entry in case["expected"].items()},
    )


def _array(name: str, entry: Any) -> Any:
    if not isinstance(entry, list):
        return NON_FINITE.get(entry, entry) if isinstance(entry, str) else entry
    array = np.array(_numbers(entry))
    if array.dtype.kind not in "biuf":
        return entry
    if "mask" in name:
        return array.astype(bool)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def _numbers(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_numbers(item) for item in entry]
    return NON_FINITE.get(entry, entry) if isinstance(entry, str) else entry


def ones(like: Any) -> jax.Array:
    return jnp.ones(np.shape(like), bool)


def zeros(like: Any) -> jax.Array:
    return jnp.zeros(np.shape(like), jnp.float32)


def floats(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def ddof(case: Case) -> int:
    return 0 if case.peer in BIASED else 1


def first_of(inputs: dict[str, Any], *names: str) -> Any:
    """The first of the inputs that is there."""
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def whitened(x: Any, mask: Any, **options: Any) -> jax.Array:
    """With the statistics of the True entries, but for all: masked ones are not zeroed."""
    count = options.pop("ddof", 0)
    return masked.standardize(
        floats(x), masked.mean(x, mask), masked.var(x, mask, ddof=count), **options
    )


def reward_to_go(rewards: Any, mask: Any, *, gamma: float = 1.0) -> jax.Array:
    """Masked tokens are steps without a reward, and hold the running return (OpenRLHF, verl)."""
    return advantages.discounted_returns(masked.fill(rewards, mask), ones(mask), gamma=gamma)


def reduction(case: Case, *, count_empty: bool = False) -> Callable[..., jax.Array]:
    """How the peer of the case reduces a loss [B, T]."""
    inputs, shape = case.inputs, np.shape(case.inputs["mask"])
    by_row = {"count_empty": count_empty}
    if inputs.get("token_level_loss") is not None:
        return reductions.token_mean if inputs["token_level_loss"] else reductions.sequence_mean
    norm = first_of(inputs, "norm", "loss_scale_factor")
    named: dict[str, Callable[..., jax.Array]] = {
        "token-mean": reductions.token_mean,
        "seq-mean-token-mean": partial(reductions.sequence_mean, **by_row),
        "sequence-mean-token-mean": partial(reductions.sequence_mean, **by_row),
        "seq-mean-token-sum": partial(reductions.sequence_sum, **by_row),
        "seq-mean-token-sum-norm": partial(
            reductions.constant_total, total=shape[-1] if norm is None else norm
        ),
        "sequence-mean-token-scale": partial(
            reductions.constant_length, length=shape[-1] if norm is None else norm, **by_row
        ),
        "sequence-mean-token-sum-norm": partial(
            reductions.constant_total, total=shape[0] if norm is None else norm
        ),
    }
    return named[inputs.get("mode") or "token-mean"]


def k3_plus(log_probs: Any, ref_log_probs: Any) -> jax.Array:
    return kl.straight_through(kl.k3(log_probs, ref_log_probs), kl.k2(log_probs, ref_log_probs))


ESTIMATORS: dict[str, Callable[..., jax.Array]] = {
    "k1": kl.k1,
    "kl": kl.k1,
    "k2": kl.k2,
    "mse": kl.k2,
    "mse_kl": kl.k2,
    "k3": kl.k3,
    "low_var_kl": kl.k3,
    "abs": kl.absolute,
    "k3+": k3_plus,
    "low_var_kl+": k3_plus,
}


def estimator(case: Case) -> Callable[..., jax.Array]:
    """The estimator that a case names, with the bounds that its peer puts on it."""
    inputs = case.inputs
    name = first_of(inputs, "estimator", "method", "kl_mode", "kl_estimator") or "k1"
    if case.peer == "openrlhf":
        return partial(ESTIMATORS[name], bound=10.0)
    if case.peer == "verl" and name in ("k3", "low_var_kl"):
        return partial(kl.k3, log_ratio_clip=20.0, bound=10.0)
    bound = inputs.get("clamp_value")
    return ESTIMATORS[name] if bound is None else partial(ESTIMATORS[name], bound=bound)
