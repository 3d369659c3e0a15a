"""Gradient accumulation: the rows of a minibatch go through a model a few at a time.

The model's pass is what needs memory, and it treats every row alone. The loss may mix rows in any
way, but it reads no more than a few numbers a token. So the pass alone is divided, and the loss is
that of the whole minibatch: a mean over tokens, a whitening, KTO's z. The price is one more
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array


def in_micro_batches(function: Callable[..., Any], num_micro_batches: int) -> Callable[..., Any]:
    """`function` of a part of the rows at a time; its gradient computes each part again.

    The gradient of the parameters is added up over the parts. Part i has the rows i, i + n,
    i + 2·n, …: where devices hold blocks of rows, each keeps a share of every part.

    Args:
      function: `(params, *rows) -> tree of arrays`; all arrays but `params` have B rows, and a row
        of the result depends on the parameters and on that row alone.
      num_micro_batches: n, static; 1 is `function` itself.

    Returns:
      a function with the same arguments and results. It raises a ValueError where n does not
      divide B.

    References:
      Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
    """
    if num_micro_batches == 1:
        return function

    def divide(x: Array) -> Array:
        if num_micro_batches < 1 or len(x) % num_micro_batches:
            raise ValueError(
                f"{len(x)} rows do not divide into {num_micro_batches} micro-batches: choose a "
                "num_micro_batches (times num_minibatches, for a whole batch) that divides them"
            )
        return x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def in_turn(params: Any, *rows: Array) -> Any:
        # In a loop nothing can merge the two computations of a part, so nothing need prevent it.
        of_part = jax.checkpoint(lambda part: function(params, *part), prevent_cse=False)
        parts = jax.lax.map(of_part, jax.tree.map(divide, rows))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

    return in_turn


def of_whole_batch(num_minibatches: int, num_micro_batches: int) -> int:
    """How many parts of a batch are as large as micro-batches, where there are any.

    Args:
      num_minibatches: of the batch.
      num_micro_batches: of a minibatch.

    Returns:
      their product; 1 where minibatches are not divided, and the batch need not be either.
    """
    return num_minibatches * num_micro_batches if num_micro_batches > 1 else 1
