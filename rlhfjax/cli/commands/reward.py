"""`rlhfjax reward`: a reward model from pairs, rankings, ratings or class labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import models, pretrained, sharding
from rlhfjax.algorithms import reward_model
from rlhfjax.cli.arguments import Reward
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, tokenized
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.example_batches import ResponseBatch, pairs_of, response_batches, shapes
from rlhfjax.data.tokenized import Tokenized
from rlhfjax.pretrained import Pretrained
from rlhfjax.types import LanguageModel, ScalarModel


class Judgements(NamedTuple):
    """What people have said of responses.

    Attributes:
      objective: what is learned from it, see `reward_model.make_step`.
      batch: what the step takes of a batch.
    """

    objective: Callable[..., Any]
    batch: Callable[[ResponseBatch], Any]


def judgements(items: Sequence[Tokenized]) -> Judgements:
    """Pairs, rankings, ratings or classes, by the format of the data."""
    kinds = {type(item.example) for item in items}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"a reward model learns from one kind of judgement, not from {names}")
    example = items[0].example
    if isinstance(example, formats.Pair):
        return Judgements(reward_model.pairs, pairs_of(items))
    if isinstance(example, formats.Ranking):
        return Judgements(reward_model.rankings, lambda batch: batch.labelled(-batch.ranks))
    labels = np.array([item.example.label for item in items], float)
    if isinstance(example, formats.Rating):
        # Scores begin near 0 and a head has no bias.
        mean, std = labels.mean(), labels.std() or 1.0
        return Judgements(
            reward_model.ratings,
            lambda batch: batch.labelled((batch.labels[:, None] - mean) / std),
        )
    thresholds = reward_model.level_thresholds(np.bincount(labels.astype(int)))
    return Judgements(
        partial(reward_model.levels, thresholds=thresholds),
        lambda batch: batch.labelled(batch.labels[:, None]),
    )


def run(args: Reward) -> None:
    """Trains a reward model."""
    with training.opened(args, formats.JUDGED) as session:
        mesh = session.run.mesh
        key = sharding.put(jax.random.key(args.seed), mesh)
        source = pretrained.load_scalar(
            args.model_name_or_path, key=key, mesh=mesh, dtype=args.dtype,
            param_dtype=jnp.float32, remat=args.gradient_checkpointing,
        )  # fmt: skip
        source = training.with_template(source, args.chat_template_path)
        tokenizer = training.of_scores(training.tokenizer_of(source))
        template = training.template_of(source)
        trunk, scorer = parts(source._replace(tokenizer=tokenizer))
        policy = training.policy(args, trunk, jax.random.fold_in(key, 1))
        max_length = min(args.max_length, source.architecture.config.context_length)
        tokenize = partial(
            tokenized.responses,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            multiple=training.multiple(max_length),
            may_lack_prompt=True,
        )
        data = session.tokenized(tokenize, template=template)
        aside = [example for of in session.held_out for example in of]
        kept = tokenize(aside, bad=session.bad)[0] if aside else []
        sizes = {"num_buckets": training.NUM_BUCKETS, "max_length": max_length}
        room = shapes(data.items, **sizes)
        layout: dict[str, Any] = {
            "batch_size": session.batch_size,
            "pad_token": tokenizer.pad_token,
        }
        judged = judgements(data.items)

        def epoch(number: int, start: int) -> Iterator[Any]:
            batches = response_batches(
                data.epoch(number), shapes=room, seed=args.seed, epoch=number, start=start,
                part=sharding.part_of_process(mesh), **layout,
            )  # fmt: skip
            return map(judged.batch, batches)

        num_steps = session.num_steps(sum(1 for _ in epoch(0, 0)))
        optimizer = training.optimizer(args, num_steps)
        update = policy.compiled(
            lambda model: reward_model.make_step(
                scorer(model),
                optimizer,
                objective=judged.objective,
                num_micro_batches=args.gradient_accumulation_steps,
            )
        )
        trained = session.train(
            "reward",
            lambda params: reward_model.init(params, optimizer),
            {"backbone": policy.params, "head": source.params["head"]},
            step=lambda state, batch: update(state, sharding.rows_of_process(batch, mesh)),
            batches=partial(batches_from, epoch=epoch),
            num_steps=num_steps,
            show={"loss": "loss"},
        )
        params = trained.state.params
        policy.save(args.output_dir / "export", params["backbone"], head=params["head"])
        held_out = {}
        if kept:
            layout |= {"shapes": shapes(kept, **sizes)}
            score = policy.compiled(partial(scored, scorer), donate=False)
            held_out = accuracy(partial(score, params), kept, layout, mesh)
        training.finish(session, trained, **held_out)


def parts(
    source: Pretrained[Any],
) -> tuple[Pretrained[LanguageModel], Callable[[LanguageModel], ScalarModel]]:
    """The language model beneath, and what makes a reward model of it or of its adapters."""
    config = source.architecture.config
    trunk = source._replace(model=models.decoder(config), params=source.params["backbone"])
    head = pretrained.score_head(config.width)
    return trunk, lambda model: models.scalar_model(model, head)


def scored(
    scorer: Callable[[LanguageModel], ScalarModel], model: LanguageModel
) -> Callable[..., Any]:
    """`(params, tokens, mask) -> scores`, compiled."""
    score = partial(reward_model.score, scorer(model))
    return jax.jit(lambda *given: sharding.whole(score(*given)))


def accuracy(
    score: Callable[..., Any], items: list[Tokenized], layout: dict[str, Any], mesh: Any
) -> dict[str, float]:
    """How often what people prefer scores higher among held-out records, with its standard error.

    Compared are the responses to a prompt where a record has several, and otherwise all records
    with one another.
    """
    scores: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in response_batches(items, seed=0, epoch=0, **layout):
        found = np.asarray(score(*sharding.rows(batch.sequences, mesh)))
        for row, example in enumerate(batch.examples):
            real = batch.real[row]
            scores.append(found.reshape(batch.real.shape)[row][real])
            labels.append(preferred(example))
    if len(scores[0]) == 1:
        right = shares(np.concatenate(scores), np.concatenate(labels))
    else:
        of_records = [shares(*both) for both in zip(scores, labels, strict=True)]
        right = np.array([of.mean() for of in of_records if len(of)])
    if len(right) == 0:
        return {"eval/num_compared": 0}
    error = right.std() / len(right) ** 0.5
    return {
        "eval/accuracy": float(right.mean()),
        "eval/accuracy_stderr": float(error),
        "eval/num_compared": len(right),
    }


def preferred(example: Any) -> np.ndarray:
    """Of each response of a record a number, the greater the better."""
    if isinstance(example, formats.Pair):
        chosen = 1.0 if example.chosen_prob is None else example.chosen_prob
        return np.array([chosen, 1.0 - chosen])
    if isinstance(example, formats.Ranking):
        return -np.array(example.ranks, float)
    return np.array([example.label], float)


def shares(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each response that has another one below or above it, how often the scores agree."""
    order = np.sign(labels[:, None] - labels[None, :])
    agree = order * np.sign(scores[:, None] - scores[None, :])
    compared = (order != 0).sum(1)
    some = compared > 0
    return ((agree > 0).sum(1)[some] + 0.5 * ((agree == 0) & (order != 0)).sum(1)[some]) / (
        compared[some]
    )
