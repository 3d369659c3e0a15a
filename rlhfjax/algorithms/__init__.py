"""Algorithms: each a state, an `init`, and a `make_step` that gives one compiled program.

cDPO is `dpo` with label smoothing, expert iteration is iterations of `rejection_sampling`.
`iteration`, `critic_free`, `direct` and `train_state` are what they are made of, and what an
algorithm of one's own is made of.
"""

from rlhfjax.algorithms import (
    best_of_n,
    cispo,
    cpo,
    critic_free,
    dapo,
    direct,
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
    rewards,
    rloo,
    sft,
    simpo,
    train_state,
)

__all__ = [
    "best_of_n",
    "cispo",
    "cpo",
    "critic_free",
    "dapo",
    "direct",
    "dpo",
    "dr_grpo",
    "grpo",
    "gspo",
    "ipo",
    "iteration",
    "kto",
    "online_dpo",
    "orpo",
    "ppo",
    "reinforce",
    "reinforce_plus_plus",
    "rejection_sampling",
    "remax",
    "reward_model",
    "rewards",
    "rloo",
    "sft",
    "simpo",
    "train_state",
]
