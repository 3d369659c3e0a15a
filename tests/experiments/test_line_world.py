"""The line world from learnt rewards: solved at a small size, and not without learning."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from experiments.line_world import SOURCES, actor, judge, main, reward_loss, solved
from rlhfjax.tasks.line_world import line_world


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "not_made_yet"


@pytest.fixture(scope="module")
def summary(out: Path) -> list[dict[str, Any]]:
    return main(["--states", "3", "6", "--seeds", "2", "--seed", "7", "--out", str(out)])


def test_every_seed_is_solved_from_both_sources(summary: list[dict[str, Any]]) -> None:
    found = [(line["states"], line["reward"], line["seeds_solved"]) for line in summary]
    assert found == [
        (length, source, 2) for length in (3, 6) for source in ("ratings", "preferences")
    ]
    # The mean of γ^k over the starts: 0.975 for 3 states and 0.905 for 6; a batch varies.
    for line in summary:
        best = {3: 0.975, 6: 0.905}[line["states"]]
        np.testing.assert_allclose(line["true_return"], best, atol=0.05)


def test_it_leaves_a_summary_and_a_picture(summary: list[dict[str, Any]], out: Path) -> None:
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("wrong", "expected"), [(None, True), (0, False), (2, False)])
def test_solved_means_the_shortest_way_from_every_state(wrong: int | None, expected: bool) -> None:
    """An actor that goes right, except in one state."""
    world = line_world(num_states=4, width=6, num_steps=12)
    params = jax.tree.map(jnp.zeros_like, actor.init(jax.random.key(0), jnp.zeros(6)))
    layers = params["params"]
    layers["layers_0"]["kernel"] = jnp.eye(6, 32)
    goes_right = np.tile([0.0, 1.0], (32, 1))
    if wrong is not None:
        goes_right[wrong] = [1.0, 0.0]
    layers["layers_2"]["kernel"] = jnp.asarray(goes_right)
    assert bool(solved(world, params)) is expected


def test_segments_with_the_same_reward_are_preferred_half_and_half() -> None:
    """A model that finds both alike is content with that, and wrong by as much the other way."""
    params = {name: judge.init(jax.random.key(0), jnp.zeros(5)) for name in SOURCES}
    observations = jax.nn.one_hot(jnp.array([[[0], [1]]]), 3)
    actions = jnp.zeros((1, 2, 1), int)

    @jax.jit
    def slope(rewards: Array) -> Array:
        pairs = (observations, actions, rewards[None, :, None])
        grads = jax.grad(lambda params: reward_loss(params, pairs)[0])(params)
        return grads["preferences"]["params"]["layers_2"]["kernel"]

    alike, first, second = (slope(jnp.array(r)) for r in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0]))
    np.testing.assert_allclose(alike, 0.0, atol=1e-7)
    np.testing.assert_allclose(first, -second, rtol=1e-5)
    assert jnp.abs(first).max() > 1e-3


@pytest.mark.parametrize("wrong", [["--states", "1"], ["--seeds", "0"], ["--iterations", "0"]])
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err
