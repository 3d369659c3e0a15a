"""The objectives that `docs/conventions.md` spells out give the numbers of their systems."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import decoded

import rlhfjax

PAGE = Path(__file__).parents[1] / "docs" / "conventions.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the code blocks define, run one after the other."""
    text, names = PAGE.read_text(encoding="utf-8"), {"__name__": "conventions"}
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
    return names


def same(given: Any, expected: Any, where: Any = ...) -> None:
    np.testing.assert_allclose(
        np.asarray(given)[where], np.asarray(expected)[where], rtol=2e-5, atol=2e-6
    )


def groups(inputs: dict[str, Any], size: int) -> np.ndarray:
    return np.repeat(np.arange(len(inputs["rewards"]) // size, dtype=np.int32), size)


def test_lm_human_preferences(page: dict[str, Any]) -> None:
    case = decoded("ppo_rollout_to_advantage/lmhp-details-torch/whiten_rewards")
    x = case.inputs
    given = page["openai_advantages"](
        x["logprobs"],
        x["ref_logprobs"],
        x["scores"],
        x["values"],
        kl_coef=x["kl_coef"],
        gamma=x["gamma"],
        gae_lambda=x["lam"],
    )
    same(given[0], case.expected["advantages"])
    same(given[1], case.expected["returns"])

    case = decoded("ppo_loss/lmhp-details-torch/combined")
    x = case.inputs
    arrays = ("logprobs", "old_logprobs", "values", "old_values", "advantages", "returns")
    loss = page["openai_loss"](
        *(x[name] for name in arrays),
        clip=x["clip"],
        clip_value=x["clip_value"],
        vf_coef=x["vf_coef"],
    )
    same(loss, case.expected["loss"])


def test_trl(page: dict[str, Any]) -> None:
    case = decoded("ppo_rollout_to_advantage/trl/k1")
    x = case.inputs
    mask = np.arange(x["values"].shape[1]) <= x["sequence_lengths"][:, None]
    given = page["trl_ppo_advantages"](
        x["logprobs"],
        x["ref_logprobs"],
        x["scores"],
        x["values"],
        mask,
        kl_coef=x["kl_coef"],
        gamma=x["gamma"],
        gae_lambda=x["lam"],
    )
    same(given[0], case.expected["advantages"])
    same(given[1], case.expected["returns"])

    case = decoded("grpo_advantage/trl/group")
    scores = case.inputs["rewards_per_func"][:, 0]
    ids = groups({"rewards": scores}, case.inputs["num_generations"])
    same(page["trl_grpo_advantages"](scores, ids), case.expected["advantages"])

    case = decoded("grpo_loss/trl/grpo_kl")
    x = case.inputs
    arrays = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask")
    loss = page["trl_grpo_loss"](*(x[name] for name in arrays), clip=x["eps_low"], beta=x["beta"])
    same(loss, case.expected["loss"])


def test_openrlhf(page: dict[str, Any]) -> None:
    case = decoded("advantage_pipeline/openrlhf/reinforce_baseline")
    x = case.inputs
    given = page["openrlhf_reinforce_baseline"](
        x["rewards"], groups(x, x["n"]), x["kl"], x["mask"], kl_coef=x["kl_coef"]
    )
    same(given[0], case.expected["advantages"])
    same(given[1], case.expected["returns"])

    case = decoded("ppo_loss/openrlhf/symmetric")
    x = case.inputs
    loss = page["openrlhf_loss"](
        x["logprobs"],
        x["old_logprobs"],
        x["advantages"],
        x["mask"],
        clip_low=x["clip_low"],
        clip_high=x["clip_high"],
    )
    same(loss, case.expected["loss"])


def test_verl(page: dict[str, Any]) -> None:
    case = decoded("gae/verl/obs/whitened")
    x = case.inputs
    given = page["verl_gae"](
        x["rewards"], x["values"], x["mask"], gamma=x["gamma"], gae_lambda=x["lam"]
    )
    same(given[0], case.expected["advantages"], x["mask"])
    same(given[1], case.expected["returns"], x["mask"])

    case = decoded("grpo_advantage/verl/std")
    x = case.inputs
    given = page["verl_grpo_advantages"](x["token_level_rewards"], x["group_ids"], x["mask"])
    same(given, case.expected["advantages"])

    case = decoded("ppo_loss/verl/symmetric")
    x = case.inputs
    arrays = ("logprobs", "old_logprobs", "advantages", "mask")
    ranges = {"clip_low": x["clip"], "clip_high": x["clip"]}
    same(page["verl_ppo_loss"](*(x[name] for name in arrays), **ranges), case.expected["loss"])


def test_tunix(page: dict[str, Any]) -> None:
    case = decoded("grpo_advantage/tunix")
    x = case.inputs
    same(
        page["tunix_grpo_advantages"](x["rewards"], groups(x, x["n"])), case.expected["advantages"]
    )

    case = decoded("grpo_loss/tunix/grpo_kl_k1")
    x = case.inputs
    arrays = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask")
    loss = page["tunix_grpo_loss"](*(x[name] for name in arrays), clip=x["eps_low"], beta=x["beta"])
    same(loss, case.expected["loss"])


def test_every_function_that_the_page_names_exists() -> None:
    homes = {name: getattr(rlhfjax, name) for name in rlhfjax.__all__}
    homes |= {name: getattr(rlhfjax.losses, name) for name in rlhfjax.losses.__all__}
    text = BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    named = set(re.findall(r"`([a-z_]+)\.([a-z_0-9]+)[`(]", text))
    assert len(named) > 20
    assert [f"{home}.{name}" for home, name in named if not hasattr(homes[home], name)] == []
