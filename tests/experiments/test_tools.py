"""Calling tools at toy size: problems, demonstrations, and all that a run leaves behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tools as script
from experiments.tools import CLOSE, END, NO, OPEN, PROMPT, TEXT, TURN, main, problems

KEYS = jax.random.split(jax.random.key(0), 64)
SIZES = [
    "--seeds", "1", "--seed", "3", "--demonstrations", "16", "--passes", "1", "--iterations", "2",
    "--episodes", "16", "--minibatches", "2", "--width", "16", "--layers", "1", "--save-every", "1",
]  # fmt: skip


def text(ids: Any) -> str:
    return "".join(TEXT[i] for i in np.asarray(ids) if i >= 0)


def tokens(written: str) -> list[int]:
    return [TEXT.index(c) for c in written] + [NO] * (TURN - len(written))


@pytest.mark.parametrize("unseen", [False, True])
def test_problems_are_told_apart_and_answered_by_the_tools(unseen: bool) -> None:
    environment = problems(jnp.bool_(True), unseen=unseen)
    state, prompts = jax.jit(jax.vmap(environment.reset))(KEYS)
    told = [text(prompt) for prompt in prompts]
    calls = [f"[{prompt.strip('?=')}]" for prompt in told]
    turns = jnp.array([tokens(call) for call in calls])
    step = jax.jit(jax.vmap(environment.step))
    _, said, reward, done = step(state, turns)
    assert not reward.any() and not done.any()
    assert 16 < sum(prompt[0] == "?" for prompt in told) < 48
    for row, prompt in enumerate(told):
        answer = text(said[row])
        assert answer == text(state["answer"][row])
        if prompt[0] == "?":
            assert (sum(map(TEXT.index, prompt[1:4])) - 3 * TEXT.index("a")) % 5 == 0 or not unseen
            assert prompt[1:4] in [text(key) for key in state["keys"][row]]
        else:
            a, b = map(int, prompt[:-1].split("+"))
            assert str(a + b) == answer
            assert ((a + 2 * b) % 5 == 0) == unseen
    answers = jnp.array([tokens(f"{text(answer)}.") for answer in said])
    _, _, reward, done = step(state, answers)
    assert reward.all() and done.all()
    _, _, reward, done = step(state, answers.at[:, 1].set(END))
    assert not reward.any() and done.all()


def test_a_tool_that_is_removed_or_not_understood_says_so() -> None:
    @jax.jit
    def called(works: jax.Array, turn: jax.Array) -> Any:
        environment = problems(works)
        return environment.step(environment.reset(KEYS[0])[0], turn)

    for works, call in ((False, "[111+222]"), (True, "[111+]"), (True, "[***]")):
        _, said, reward, done = called(works, jnp.array(tokens(call)))
        assert (text(said), float(reward), bool(done)) == ("?", 0.0, False)


def test_most_demonstrations_are_wrong_and_only_what_is_written_is_learned() -> None:
    ids, real, learned = jax.jit(jax.vmap(script.demonstrate))(KEYS)
    assert ids.min() >= 0 and not np.asarray(learned & ~real).any()
    first, last = learned[:, PROMPT : PROMPT + TURN], learned[:, -TURN:]
    assert not learned[:, :PROMPT].any() and not learned[:, PROMPT + TURN : -TURN].any()
    calls = np.asarray(ids[:, PROMPT] == OPEN)
    assert 0.3 < calls.mean() < 0.9
    assert np.asarray(first.any(1)).all()
    np.testing.assert_array_equal(last.any(1), calls)
    ends = np.asarray(jnp.isin(ids, jnp.array([END, CLOSE])) & learned).sum(1)
    np.testing.assert_array_equal(ends, 1 + calls)
    reset = problems(jnp.bool_(True)).reset
    state, _ = jax.jit(jax.vmap(lambda key: reset(jax.random.split(key)[0])))(KEYS)
    right = np.asarray(ids[:, -TURN:][:, :3] == state["answer"]).all(1)
    assert 0.1 < right.mean() < 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "not_made_yet"
    return out, main([*SIZES, "--out", str(out)])


@pytest.mark.slow
class TestRun:
    def test_leaves_its_files(self, run: tuple[Path, dict[str, Any]]) -> None:
        out, summary = run
        assert json.loads((out / "summary.json").read_text()) == summary
        assert (out / "success.png").read_bytes().startswith(b"\x89PNG")
        rows = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
        assert [row["stage"] for row in rows] == ["sft"] + ["ppo"] * 2
        assert rows[-1].keys() >= {"success", "success/seed 0", "episodes/truncated"}
        header, _, *samples = (out / "samples.md").read_text().splitlines()[4:]
        assert header.startswith("| prompt | turn 1 |") and len(samples) == script.SHOWN
        assert summary["compilations_after_first_iteration"] == 0
        assert len(summary["with_tool"]["success/sums"]) == summary["seeds"] == 1
        assert summary["seeds_solved"] == 0

    def test_goes_on_to_the_same_end(self, run: tuple[Path, Any], tmp_path: Path) -> None:
        out, summary = run
        again = tmp_path / "again"
        shutil.copytree(out, again)
        shutil.rmtree(again / "checkpoints" / "ppo" / "2")
        resumed = main([*SIZES, "--out", str(again), "--resume"])
        for name in ("metrics.jsonl", "samples.md"):
            assert (again / name).read_bytes() == (out / name).read_bytes()
        kept = [name for name in summary if not name.startswith(("seconds", "compilations"))]
        assert [resumed[name] for name in kept] == [summary[name] for name in kept]


def test_grpo_takes_the_place_of_ppo() -> None:
    args = script.arguments([*SIZES, "--algorithm", "grpo"])
    model = script.build(args)
    start, iterate, policy_of = script.algorithm(args, model)
    policies = jax.eval_shape(jax.vmap(model.init), KEYS[:2])
    state = jax.eval_shape(start, policies, KEYS[:2])
    after, metrics = iterate.eval_shape(state, policies, jnp.array([True, False]))
    assert jax.tree.structure(policy_of(after.params)) == jax.tree.structure(policies)
    assert metrics.keys() >= {"success/records", "success/without tool", "kl"}


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--episodes", "30"], ["--algorithm", "dpo"]])
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err
