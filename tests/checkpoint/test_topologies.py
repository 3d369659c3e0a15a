"""A state that was saved on one mesh is restored on another one, equal to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from rlhfjax import checkpoint, models, sharding
from rlhfjax.algorithms import ppo

assert jax.device_count() == 8
config = models.DecoderConfig(vocab_size=16, context_length=8, width=16, num_layers=1, num_heads=8)
model = models.decoder(config)
actor_critic = models.shared_trunk(model, models.linear_head(16, stddev=0.1))
optimizer = optax.adamw(1e-3)


def start(key):
    return ppo.init(actor_critic.init(key), optimizer, key, kl_coef=0.05)


def bits(state):
    return {name: np.asarray(x).tobytes() for name, x in checkpoint.flatten(state).items()}


meshes = {
    "1": sharding.mesh(devices=jax.devices()[:1]),
    "8x1x1": sharding.mesh(),
    "1x8x1": sharding.mesh(fsdp=8),
    "2x2x2": sharding.mesh(fsdp=2, tensor=2),
    "1x1x8": sharding.mesh(tensor=8),
}
like = jax.eval_shape(start, jax.random.key(0))
made = start(jax.random.key(0))
first = None
for name, mesh in meshes.items():
    state = sharding.put(made, mesh)
    first = first or (bits(state), checkpoint.digests(state))
    assert bits(state) == first[0]
    assert checkpoint.digests(state) == first[1], "a digest knows nothing of the mesh"
    with checkpoint.Checkpoints(Path(sys.argv[1]) / name, config={}) as checkpoints:
        checkpoints.save(1, state, cursor={})

pairs = [("1", "8x1x1"), ("1", "2x2x2"), ("1x8x1", "1"), ("2x2x2", "1"), ("1x1x8", "1x8x1")]
for there, here in pairs:
    places = sharding.shardings(like, meshes[here])
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places
    )
    with checkpoint.Checkpoints(Path(sys.argv[1]) / there, config={}) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert bits(restored.state) == first[0], (there, here)
    for x, place in zip(jax.tree.leaves(restored.state), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), (x, place)
    print(there, "->", here)
"""


# Shapes say nothing of places: the arrays are where this process makes new ones.
HERE = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from rlhfjax import checkpoint, sharding

folder = Path(sys.argv[1])
state = {"w": jnp.arange(64.0), "key": jax.random.key(3)}
like = jax.eval_shape(lambda: state)
mesh = sharding.mesh(fsdp=jax.device_count())


def of(state):
    return {"w": state["w"]}


def is_here(found, wanted):
    here = all(x.sharding == jnp.zeros(()).sharding for x in jax.tree.leaves(found))
    return here and checkpoint.digests(found) == checkpoint.digests(wanted)


with checkpoint.Checkpoints(folder / "steps", config={}) as checkpoints:
    if len(sys.argv) > 2:
        print("step", is_here(checkpoints.restore(like).state, state))
        print("parameters", is_here(checkpoint.restore(folder / "w", of(like)), of(state)))
    else:
        checkpoints.save(1, sharding.put(state, mesh), cursor={})
        checkpoint.save(folder / "w", sharding.put(of(state), mesh))
"""


def run(program: str, devices: int, *args: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        },
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_every_mesh_reads_what_another_has_written(tmp_path: Path) -> None:
    wanted = ["1 -> 8x1x1", "1 -> 2x2x2", "1x8x1 -> 1", "2x2x2 -> 1", "1x1x8 -> 1x8x1"]
    assert run(PROGRAM, 8, str(tmp_path)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here"), [(8, 1), (1, 8)])
def test_shapes_suffice_where_there_are_other_devices(
    tmp_path: Path, there: int, here: int
) -> None:
    assert run(HERE, there, str(tmp_path)) == []
    assert run(HERE, here, str(tmp_path), "restore") == ["step True", "parameters True"]
