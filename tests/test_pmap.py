"""On eight devices, under `jax.pmap`, the pure functions give what they give without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import jax
import numpy as np
from rlhfjax import advantages, kl, log_probs, masked, sampling
from rlhfjax.losses import policy, reductions, reward, value

assert jax.local_device_count() == 8
rng = np.random.default_rng(0)
a, b, c = rng.normal(size=(3, 8, 3, 5)).astype(np.float32)
logits = rng.normal(size=(8, 3, 5, 7)).astype(np.float32)
tokens = rng.integers(0, 7, (8, 3, 5)).astype(np.int32)
uniform = rng.random((8, 3, 5)).astype(np.float32)
mask = rng.random((8, 3, 5)) < 0.7
one = {"clip_range": 0.2}
calls = {
    "gae": (lambda *x: advantages.gae(*x, gamma=0.97, gae_lambda=0.9), (a, b, mask)),
    "token_rewards": (
        lambda *x: advantages.token_rewards(*x, kl_coef=0.1), (a[..., 0], b, mask)
    ),
    "whiten": (masked.whiten, (a, mask)),
    "k3": (kl.k3, (a, b)),
    "log-probabilities": (log_probs.token_log_probs_and_entropy, (logits, tokens)),
    "ppo_clip": (lambda *x: policy.ppo_clip(*x, **one), (a, b, c, mask)),
    "gradient of ppo_clip": (
        lambda *x: jax.grad(lambda y: policy.ppo_clip(y, *x[1:], **one)[0])(x[0]), (a, b, c, mask)
    ),
    "clipped_value_loss": (lambda *x: value.clipped_value_loss(*x, **one), (a, b, c, mask)),
    "pairwise": (reward.pairwise, (a[..., 0], b[..., 0], mask[..., 0])),
    "categorical": (sampling.categorical, (logits, uniform)),
}
for name, (function, arguments) in calls.items():
    spread = jax.pmap(function)(*arguments)
    for device in range(8):
        alone = function(*(x[device] for x in arguments))
        jax.tree.map(
            lambda s, x: np.testing.assert_allclose(
                s[device], x, rtol=1e-6, atol=1e-6, err_msg=name
            ),
            spread,
            alone,
        )
print("compared", len(calls))

# A loss averaged over devices, each weighted with what it counts, is the loss of the whole batch.
counted = {"token_mean": reductions.num_tokens, "sequence_mean": reductions.num_sequences}
mask[5] = False
for name, weight in counted.items():
    def of_device(*x):
        loss = policy.ppo_clip(*x, **one, reduce=getattr(reductions, name))[0]
        share = weight(x[-1])
        return jax.lax.psum(loss * share, "devices") / jax.lax.psum(share, "devices")
    averaged = jax.pmap(of_device, axis_name="devices")(a, b, c, mask)
    whole = (x.reshape(24, 5) for x in (a, b, c, mask))
    loss = policy.ppo_clip(*whole, **one, reduce=getattr(reductions, name))[0]
    np.testing.assert_allclose(averaged, np.full(8, loss), rtol=1e-6)
    print("averaged", name)
"""


@pytest.mark.slow
def test_pure_functions_are_the_same_under_pmap() -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    wanted = "compared 10\naveraged token_mean\naveraged sequence_mean\n"
    assert ran.stdout == wanted, ran.stderr
