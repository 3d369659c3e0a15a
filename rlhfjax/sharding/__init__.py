"""One program over many devices: a mesh, where each array lies on it, and batches divided by rows.

Nothing else knows of devices. A step that `make_step` compiled runs on a mesh as it is:

    mesh = sharding.mesh(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        start = lambda key: ppo.init(model.init(key), optimizer, key, kl_coef=0.05)
        state = sharding.init(start, mesh)(jax.random.key(0))
        prompts, prompt_mask = sharding.rows((prompts, prompt_mask), mesh)
        state, metrics = step(state, prompts, prompt_mask, ref_params, reward_params, hyper)

The axes: `data` divides the rows of a batch; `fsdp` divides the rows too, and parameters and
optimiser state, which are gathered when they are used; `tensor` divides the matrices of a layer,
whose parts all devices along it work on together.
"""

from rlhfjax.sharding.axes import AXES, ROWS
from rlhfjax.sharding.layout import (
    Rules,
    init,
    mesh,
    part_of_process,
    put,
    rows,
    rows_of_process,
    shardings,
)
from rlhfjax.sharding.step import Step
from rlhfjax.sharding.traced import in_step, per_device, row_numbers, split_rows, table, whole

__all__ = [
    "AXES",
    "ROWS",
    "Rules",
    "Step",
    "in_step",
    "init",
    "mesh",
    "part_of_process",
    "per_device",
    "put",
    "row_numbers",
    "rows",
    "rows_of_process",
    "shardings",
    "split_rows",
    "table",
    "whole",
]
