"""From scores to advantages: token rewards, returns, baselines, weights for another sampler.

Nothing here sees a model, and nothing whitens: `masked.whiten` is applied by the caller who wants
it.
"""

from rlhfjax.advantages.groups import (
    gpg,
    group_relative,
    leave_one_out,
    opo,
    optimal_token_baseline,
    pass_at_k,
    scale_by_group_std,
)
from rlhfjax.advantages.importance import (
    normalize_weights,
    on_policy_sequences,
    reject_weights,
    sequence_importance_weights,
    token_importance_weights,
    truncate_weights,
)
from rlhfjax.advantages.returns import (
    carry_back,
    discounted_returns,
    gae,
    lambda_returns,
    n_step_returns,
    remax,
    value_targets,
)
from rlhfjax.advantages.rewards import (
    at_ends_of_turns,
    bound_scores,
    combine_scores,
    overlong_penalty,
    penalize_kl,
    penalize_missing_end,
    score_at_end,
    spread,
    token_rewards,
)

__all__ = [
    "at_ends_of_turns",
    "bound_scores",
    "carry_back",
    "combine_scores",
    "discounted_returns",
    "gae",
    "gpg",
    "group_relative",
    "lambda_returns",
    "leave_one_out",
    "n_step_returns",
    "normalize_weights",
    "on_policy_sequences",
    "opo",
    "optimal_token_baseline",
    "overlong_penalty",
    "pass_at_k",
    "penalize_kl",
    "penalize_missing_end",
    "reject_weights",
    "remax",
    "scale_by_group_std",
    "score_at_end",
    "sequence_importance_weights",
    "spread",
    "token_importance_weights",
    "token_rewards",
    "truncate_weights",
    "value_targets",
]
