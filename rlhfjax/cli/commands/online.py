"""`rlhfjax ppo`, `grpo`, `rloo`: learning from a policy's own samples."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from rlhfjax import models, rewards, sharding
from rlhfjax.algorithms import grpo, ppo, rloo
from rlhfjax.cli import arguments, stops
from rlhfjax.cli.commands import judges, training
from rlhfjax.cli.commands.generate import tokens_of
from rlhfjax.cli.samples import write_completions
from rlhfjax.data import formats, tokenized
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.example_batches import PromptBatch, prompt_batches
from rlhfjax.data.tokenized import Tokenized
from rlhfjax.pretrained import Tokenizer
from rlhfjax.types import LanguageModel, Params, Rollout

MULTIPLE = 8  # of prompt lengths


class Learner(NamedTuple):
    """An algorithm with its numbers.

    Attributes:
      algorithm: its module.
      config: what is static.
      hyper: what is not.
      build: from the language model to what is trained.
      start: `(policy's parameters, optimizer, key) -> state`.
      policy_of: the policy's parameters among those of the state.
    """

    algorithm: Any
    config: Any
    hyper: Any
    build: Callable[[LanguageModel], Any]
    start: Callable[..., Any]
    policy_of: Callable[[Params], Params]


def run(args: Any) -> None:
    """Trains a policy."""
    judges.must_exist(args.reward_funcs)
    with training.opened(args, formats.PROMPTS) as session:
        mesh = session.run.mesh
        group_size = getattr(args, "num_generations", 1)
        num_prompts, rest = divmod(session.batch_size * args.num_mini_batches, group_size)
        if rest:
            raise ValueError(
                f"{session.batch_size} rows in each of {args.num_mini_batches} mini-batches are no "
                f"multiple of {group_size} completions of a prompt: change "
                "--per_device_train_batch_size or --num_generations"
            )
        source = training.load(args, mesh, remat=args.gradient_checkpointing, param_dtype="float32")
        tokenizer = training.tokenizer_of(source)
        model_key, key = jax.random.split(sharding.put(jax.random.key(args.seed), mesh))
        policy = training.policy(args, source, model_key)
        context = source.model.context_length
        data = session.tokenized(
            tokenized.responses,
            tokenizer=tokenizer,
            template=training.template_of(source),
            max_prompt_length=min(args.max_prompt_length, room_for_prompts(args, context)),
        )
        length, num_tokens = lengths(args, data.items, context)
        width = source.architecture.config.width
        learner = LEARNERS[type(args)](args, tokenizer, num_tokens, width)

        def epoch(number: int, start: int) -> Iterator[PromptBatch]:
            places = data.stream(start * num_prompts)
            return prompt_batches(
                places, batch_size=num_prompts, length=length, pad_token=tokenizer.pad_token
            )

        per_epoch = max(len(data.items) // num_prompts, 1)
        num_steps = session.num_steps(per_epoch)
        num_epochs = learner.config.num_epochs
        optimizer = training.optimizer(args, num_steps * num_epochs * args.num_mini_batches)

        def halves(model: LanguageModel) -> tuple[Callable[..., Any], Callable[..., Any]]:
            return learner.algorithm.make_halves(learner.build(model), optimizer, learner.config)

        def drawn(model: LanguageModel) -> Callable[..., Rollout]:
            half = halves(model)[0]
            return jax.jit(lambda *given: sharding.whole(half(*given)))

        sample = policy.compiled(drawn, donate=False)
        learn = policy.compiled(lambda model: halves(model)[1])
        with judges.opened(args, source, mesh) as judge:
            rules = stops.asked(args)
            if args.stop_when_falls not in (None, *judge.names):
                raise ValueError(
                    f"--stop_when_falls {args.stop_when_falls} is none of the --reward_funcs: "
                    f"{', '.join(judge.names)}"
                )

            def step(state: Any, batch: PromptBatch) -> tuple[Any, dict[str, Any]]:
                number = int(state.step) + 1
                prompts = sharding.rows((batch.tokens, batch.mask), mesh)
                samples = sample(state, *prompts, learner.hyper)
                asked = [e for e in batch.examples for _ in range(group_size)]
                at = rewards.TrainerState(number, num_steps, number / per_epoch)
                texts, scores, measured = scored(judge, tokenizer, asked, samples, at)
                if number % args.log_completions_steps == 1 or args.log_completions_steps == 1:
                    write_table(session.run.is_first, args.output_dir, number, asked, texts, scores)
                scores = sharding.rows(scores, mesh)
                state, metrics = learn(state, samples, scores, policy.ref_params, learner.hyper)
                return state, metrics | measured

            trained = session.train(
                learner.algorithm.__name__.rpartition(".")[2],
                lambda params, key: learner.start(params, optimizer, key),
                policy.params,
                key,
                step=step,
                batches=partial(batches_from, epoch=epoch),
                num_steps=num_steps,
                best="objective/rlhf_reward",
                stop=stops.first_reason(rules, num_steps) if rules else None,
                show={"score": "objective/scores", "kl": "objective/kl"},
            )
        policy.save(args.output_dir / "export", learner.policy_of(trained.state.params))
        training.finish(session, trained)


def room_for_prompts(args: arguments.Online, context: int) -> int:
    """Tokens that completions leave, but half of the context at least."""
    return max(context - args.max_completion_length, context // 2)


def lengths(args: arguments.Online, items: list[Tokenized], context: int) -> tuple[int, int]:
    """Of prompts and of completions in tokens; completions get what the context leaves."""
    longest = max(len(item.prompt) for item in items)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, max(longest, room_for_prompts(args, context)))
    num_tokens = min(args.max_completion_length, context - length)
    if num_tokens < args.max_completion_length:
        print(
            f"completions have {num_tokens} tokens and not --max_completion_length "
            f"{args.max_completion_length}: the context has {context}, prompts up to {length}",
            file=sys.stderr,
        )
    return length, num_tokens


def scored(
    judge: rewards.Combined,
    tokenizer: Tokenizer,
    asked: list[formats.Prompt],
    samples: Rollout,
    at: rewards.TrainerState,
) -> tuple[list[str], np.ndarray, dict[str, float]]:
    """Completions, what the rewards say of them, and what is measured of both."""
    ids = tokens_of(samples)
    texts = tokenizer.decode(ids)
    scores, measured = judges.ask(judge, asked, texts, completion_ids=ids, trainer_state=at)
    if jax.process_count() > 1:  # a function in Python may answer each of them otherwise
        scores = multihost_utils.broadcast_one_to_all(scores)
    lengths = np.array([len(row) for row in ids])
    return (
        texts,
        scores,
        measured
        | {
            "completions/mean_length": lengths.mean(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": (lengths == samples.response_mask.shape[1]).mean(),
        },
    )


def write_table(
    first: bool, out: Path, number: int, asked: list[Any], texts: list[str], scores: np.ndarray
) -> None:
    """The samples of an iteration, for a reader."""
    if first:
        prompts = [
            e.prompt if isinstance(e.prompt, str) else str(e.prompt[-1]["content"]) for e in asked
        ]
        try:
            write_completions(out / "samples" / f"{number:06d}.md", prompts, texts, scores)
        except OSError as error:
            warnings.warn(f"no table of samples: {error}; training goes on", stacklevel=2)


def _config(args: Any, tokenizer: Tokenizer, num_tokens: int) -> dict[str, Any]:
    return {
        "num_tokens": num_tokens,
        "pad_token": tokenizer.pad_token,
        "end_token": tokenizer.end_tokens,
        "num_minibatches": args.num_mini_batches,
        "num_micro_batches": args.gradient_accumulation_steps,
    }


def _ppo(args: arguments.PPO, tokenizer: Tokenizer, num_tokens: int, width: int) -> Learner:
    head = models.linear_head(width, stddev=0.0)

    def build(model: LanguageModel) -> models.ActorCritic:
        if args.use_peft:
            return models.shared_trunk(model, head)
        return models.separate_trunks(model, models.scalar_model(model, head))

    def start(params: Params, optimizer: Any, key: Array) -> ppo.State:
        new = head.init(key)
        if args.use_peft:
            both = {"policy": params, "head": new}
        else:
            both = {"policy": params, "value": {"backbone": params, "head": new}}
        return ppo.init(both, optimizer, key, kl_coef=args.kl_coef)

    hyper = ppo.Hyperparameters(
        temperature=args.temperature,
        gamma=args.gamma,
        gae_lambda=args.lam,
        clip_range=args.cliprange,
        value_clip_range=args.cliprange_value,
        value_coef=args.vf_coef,
        kl_horizon=jnp.inf,
    )
    config = ppo.Config(**_config(args, tokenizer, num_tokens), num_epochs=args.num_ppo_epochs)
    return Learner(ppo, config, hyper, build, start, lambda params: params["policy"])


def _grouped(
    algorithm: Any, hyper: Any, args: arguments.Grouped, tokenizer: Tokenizer, num_tokens: int
) -> Learner:
    config = algorithm.Config(
        **_config(args, tokenizer, num_tokens),
        num_epochs=args.num_iterations,
        group_size=args.num_generations,
    )
    return Learner(
        algorithm, config, hyper, lambda model: model, algorithm.init, lambda params: params
    )


def _grpo(args: arguments.GRPO, tokenizer: Tokenizer, num_tokens: int, _: int) -> Learner:
    hyper = grpo.Hyperparameters(
        temperature=args.temperature, kl_coef=args.beta, clip_range=args.epsilon
    )
    return _grouped(grpo, hyper, args, tokenizer, num_tokens)


def _rloo(args: arguments.RLOO, tokenizer: Tokenizer, num_tokens: int, _: int) -> Learner:
    hyper = rloo.Hyperparameters(temperature=args.temperature, kl_coef=args.beta)
    return _grouped(rloo, hyper, args, tokenizer, num_tokens)


LEARNERS: dict[type, Callable[..., Learner]] = {
    arguments.PPO: _ppo,
    arguments.GRPO: _grpo,
    arguments.RLOO: _rloo,
}
