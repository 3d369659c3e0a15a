"""Models: one decoder with switches, scalar heads, adapters, and the pair that PPO trains."""

from rlhfjax.models import lora
from rlhfjax.models.actor_critic import ActorCritic, separate_trunks, shared_trunk
from rlhfjax.models.attention import Llama3, Rotary, Stretched
from rlhfjax.models.config import DecoderConfig
from rlhfjax.models.decoder import decoder
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
    "Llama3",
    "Rotary",
    "ScalarHead",
    "Stretched",
    "decoder",
    "last_value",
    "linear_head",
    "lora",
    "rescale",
    "same_vocabulary",
    "scalar_model",
    "separate_trunks",
    "shared_trunk",
]
