"""DAPO: GRPO that clips higher above than below, counts tokens, and samples until groups differ.

A group whose scores are all equal teaches nothing. So prompts come in rounds: further ones are
sampled until there are as many groups that differ as a round has prompts, or no round is left.
With a Python reward the rounds are a loop of the caller's, between the halves:

    collected = None
    for number, (prompts, mask) in enumerate(rounds):
        samples = sample(state, prompts, mask, hyper, number)
        collected = dapo.collect(
            collected or dapo.nothing_of(samples), samples, scores_of(samples), group_size=8
        )
        if collected.num_groups == len(prompts):
            break
    state, metrics = learn(state, collected.rollout, collected.scores, ref_params, hyper)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import advantages, kl, masked, sequences, sharding
from rlhfjax.algorithms import checks, critic_free, grpo, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.algorithms.iteration import Metrics, Reward, State
from rlhfjax.losses import policy
from rlhfjax.types import LanguageModel, Loss, Params, Rollout


@dataclass(frozen=True)
class Config(critic_free.GroupConfig):
    """What decides shapes and loops; static.

    Attributes:
      num_rounds: R; a step takes R·N prompts and learns from N groups.
    """

    num_rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rounds < 1:
            raise ValueError(f"num_rounds={self.num_rounds}: at least one round is sampled")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of k3 in the loss; the paper has none.
      clip_range: ε below 1 of the ratio.
      clip_range_high: ε above 1.
      std_eps: added to the standard deviation of a group.
      overlong_buffer: tokens before T, all positions of a response, from which length costs score,
        up to
      overlong_factor: at T.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.0
    clip_range: float | Array = 0.2
    clip_range_high: float | Array = 0.28
    std_eps: float | Array = 1e-4
    overlong_buffer: float | Array = 0.0
    overlong_factor: float | Array = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Collected:
    """The groups found so far; the rows of the others have no score.

    Attributes:
      rollout: N·G samples.
      scores: [N·G], NaN where a place is still free.
      num_groups: [] int32, of the N that are filled.
    """

    rollout: Rollout
    scores: Array
    num_groups: Array


def nothing_of(samples: Rollout) -> Collected:
    """Room for as many groups as a round has, all of it free.

    Args:
      samples: a round.

    Returns:
      a `Collected`.
    """
    return Collected(samples, jnp.full(len(samples.tokens), jnp.nan), jnp.int32(0))


def collect(collected: Collected, samples: Rollout, scores: Array, *, group_size: int) -> Collected:
    """Puts the groups whose scores differ into the free places, as many as there are.

    Args:
      collected: before.
      samples: N·G rows of another round.
      scores: [N·G], or [N·G, T] rewards of tokens; those that are not finite are ignored.
      group_size: G.

    Returns:
      the groups found so far.

    References:
      Yu et al. 2025, DAPO, §3.2.
    """
    scores = iteration.of_responses(samples, scores)
    grouped = scores.reshape(-1, group_size)
    finite = jnp.isfinite(grouped)
    lowest = jnp.where(finite, grouped, jnp.inf).min(1)
    differ = jnp.where(finite, grouped, -jnp.inf).max(1) > lowest
    num_places = len(grouped)
    place = jnp.where(differ, collected.num_groups + jnp.cumsum(differ) - 1, num_places)
    rows = (place[:, None] * group_size + jnp.arange(group_size)).ravel()
    rollout, scores = jax.tree.map(
        lambda old, new: old.at[rows].set(new, mode="drop"),
        (collected.rollout, collected.scores),
        (samples, scores),
    )
    num_groups = jnp.minimum(collected.num_groups + differ.sum(), num_places)
    return Collected(rollout, scores, num_groups.astype(jnp.int32))


def sample(
    state: State,
    prompts: Array,
    prompt_mask: Array,
    hyper: Hyperparameters,
    number: int | Array = 0,
    *,
    model: LanguageModel,
    config: Config,
) -> Rollout:
    """The first phase: one round of samples.

    Args:
      state: the state at the start of the iteration.
      prompts: [N, P] int32, left-padded.
      prompt_mask: [N, P] bool.
      hyper: the numbers.
      number: which round of the iteration it is; each has a key of its own.
      model: the policy.
      config: lengths and tokens.

    Returns:
      a `Rollout` of N·G rows.
    """
    state = replace(state, key=jax.random.fold_in(state.key, number))
    return critic_free.sample(state, prompts, prompt_mask, hyper, model=model, config=config)


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """`grpo.estimate` of score + `advantages.overlong_penalty`.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B, T].

    References:
      Yu et al. 2025, DAPO, §3.4.
    """
    penalty = advantages.overlong_penalty(
        sequences.lengths(batch.mask),
        max_length=batch.mask.shape[1],
        buffer=hyper.overlong_buffer,
        factor=hyper.overlong_factor,
    )
    shaped = replace(batch, rewards=batch.rewards + advantages.score_at_end(penalty, batch.mask))
    of_group = grpo.Hyperparameters(std_eps=hyper.std_eps)
    return replace(batch, advantages=grpo.estimate(shaped, of_group).advantages)


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`policy.ppo_clip` with ε_high + β·k3, means over the tokens of the batch.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics, with TRL's `kl`, the mean of k3.

    References:
      Yu et al. 2025, DAPO, eq. 8.
    """
    surrogate, metrics = policy.ppo_clip(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
        clip_range_high=hyper.clip_range_high,
    )
    divergence = masked.mean(kl.k3(log_probs, batch.ref_log_probs), batch.mask)
    return surrogate + hyper.kl_coef * divergence, metrics | {"kl": divergence}


init = iteration.init
learn = partial(critic_free.learn, estimate=estimate, loss=loss)


def make_step(
    model: LanguageModel,
    reward: Reward,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> Callable[..., tuple[State, Metrics]]:
    """A whole iteration as one compiled program: rounds until enough groups differ, then `learn`.

    Args:
      model: the policy.
      reward: `(reward_params, rollout) -> scores [N·G]`, or [N·G, T] of tokens; pure.
      optimizer: any optax optimiser; one update a minibatch.
      config: what is static.

    Returns:
      `step(state, prompts, prompt_mask, ref_params, reward_params, hyper) -> (state, metrics)` of
      R·N prompts, with the metrics `val/num_groups` and `val/num_rounds`. The state is donated.
      The `objective/…` metrics are of the groups that are learned from. Places that no group was
      found for have no score and count nowhere but in `val/num_unscored`; `val/num_scored` is of
      all rounds, so that a reward that fails can be told from groups that do not differ.

    Raises:
      ValueError: a token of the config is not in the vocabulary.
    """
    checks.special_tokens(config, vocab_size=model.vocab_size)

    def step(
        state: State,
        prompts: Array,
        prompt_mask: Array,
        ref_params: Params,
        reward_params: Params,
        hyper: Hyperparameters,
    ) -> tuple[State, Metrics]:
        if len(prompts) % config.num_rounds:
            raise ValueError(
                f"{len(prompts)} prompts do not divide into num_rounds={config.num_rounds}: each "
                "round needs as many"
            )
        prompts, prompt_mask = (
            x.reshape(config.num_rounds, -1, x.shape[1]) for x in (prompts, prompt_mask)
        )
        num_places = prompts.shape[1]

        def scored(number: int | Array) -> tuple[Rollout, Array]:
            samples = sample(
                state,
                prompts[number],
                prompt_mask[number],
                hyper,
                number,
                model=model,
                config=config,
            )
            return samples, reward(reward_params, samples)

        def more(carry: tuple[Array, Array, Collected]) -> Array:
            number, _, collected = carry
            return (number < config.num_rounds) & (collected.num_groups < num_places)

        def another(carry: tuple[Array, Array, Collected]) -> tuple[Array, Array, Collected]:
            number, num_scored, collected = carry
            samples, scores = scored(number)
            num_scored += jnp.isfinite(scores).sum()
            collected = collect(collected, samples, scores, group_size=config.group_size)
            return number + 1, num_scored, collected

        samples, scores = scored(0)
        collected = collect(nothing_of(samples), samples, scores, group_size=config.group_size)
        number, num_scored, collected = jax.lax.while_loop(
            more, another, (jnp.int32(1), jnp.isfinite(scores).sum(), collected)
        )
        state, metrics = learn(
            state,
            collected.rollout,
            collected.scores,
            ref_params,
            hyper,
            model=model,
            optimizer=optimizer,
            config=config,
        )
        metrics |= {
            "val/num_groups": collected.num_groups,
            "val/num_rounds": number,
            "val/num_scored": num_scored,
        }
        return state, metrics

    compiled = sharding.Step(step)
    return checks.Checked(compiled, "prompts", vocab_size=model.vocab_size)


_, make_halves = iteration.makers(sample, learn)
