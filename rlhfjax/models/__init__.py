"""Models: one decoder with switches, scalar heads, and the pair that PPO trains."""

from rlhfjax.models.actor_critic import ActorCritic, separate_trunks, shared_trunk
from rlhfjax.models.decoder import DecoderConfig, decoder
from rlhfjax.models.heads import (
    ScalarHead,
    last_value,
    linear_head,
    rescale,
    same_vocabulary,
    scalar_model,
)

__all__ = [
    "ActorCritic",
    "DecoderConfig",
    "ScalarHead",
    "decoder",
    "last_value",
    "linear_head",
    "rescale",
    "same_vocabulary",
    "scalar_model",
    "separate_trunks",
    "shared_trunk",
]
