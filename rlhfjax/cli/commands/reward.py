"""`rlhfjax reward`: a reward model from pairs, rankings, ratings or class labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import pretrained, sharding
from rlhfjax.algorithms import reward_model
from rlhfjax.cli import memory
from rlhfjax.cli.arguments import Reward
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, tokenized
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.example_batches import ResponseBatch, response_batches, shapes
from rlhfjax.data.tokenized import Tokenized


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
    example = items[0].example
    if isinstance(example, formats.Pair):
        return Judgements(reward_model.pairs, lambda batch: batch.pairs)
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
    if args.use_peft:
        raise ValueError("a reward model is trained as a whole: leave out --use_peft")
    with training.opened(args, formats.JUDGED) as session:
        mesh = session.run.mesh
        key = sharding.put(jax.random.key(args.seed), mesh)
        source = pretrained.load_scalar(
            args.model_name_or_path, key=key, mesh=mesh, dtype=args.dtype,
            param_dtype=jnp.float32, remat=args.gradient_checkpointing,
        )  # fmt: skip
        tokenizer = training.tokenizer_of(source)
        tokenize = partial(
            tokenized.responses,
            tokenizer=tokenizer,
            template=training.template_of(source, args.chat_template_path),
            max_length=min(args.max_length, source.architecture.config.context_length),
            may_lack_prompt=True,
        )
        data = session.tokenized(tokenize)
        room = shapes(data.items, num_buckets=training.NUM_BUCKETS)
        layout = {"batch_size": session.batch_size, "pad_token": tokenizer.pad_token}
        judged = judgements(data.items)

        def epoch(number: int, start: int) -> Iterator[Any]:
            batches = response_batches(
                data.epoch(number), shapes=room, seed=args.seed, epoch=number, start=start,
                part=sharding.part_of_process(mesh), **layout,
            )  # fmt: skip
            return map(judged.batch, batches)

        num_steps = session.num_steps(sum(1 for _ in epoch(0, 0)))
        optimizer = training.optimizer(args, num_steps)
        update = memory.explained(
            reward_model.make_step(
                source.model,
                optimizer,
                objective=judged.objective,
                num_micro_batches=args.gradient_accumulation_steps,
            )
        )
        trained = session.train(
            "reward",
            lambda params: reward_model.init(params, optimizer),
            source.params,
            step=lambda state, batch: update(state, sharding.rows_of_process(batch, mesh)),
            batches=partial(batches_from, epoch=epoch),
            num_steps=num_steps,
            show={"loss": "loss"},
        )
        params = trained.state.params
        pretrained.save_scalar(
            args.output_dir / "export", source, params, pad_token=tokenizer.pad_token,
            overwrite=True,
        )  # fmt: skip
        held_out = {}
        if args.eval_fraction:
            found = training.examples(
                args, args.dataset_name, formats.PREFERENCES, side=training.HELD_OUT
            )
            pairs = [pair for of in found for pair in of]
            held_out = accuracy(params, source, tokenize(pairs)[0], layout, mesh)
        training.finish(session, trained, **held_out)


def accuracy(
    params: Any, source: Any, items: list[Any], layout: dict[str, Any], mesh: Any
) -> dict[str, float]:
    """How often the chosen response scores higher on held-out pairs, with its standard error."""
    score = jax.jit(lambda *given: sharding.whole(reward_model.score(source.model, *given)))
    right: list[bool] = []
    for batch in response_batches(
        items, shapes=shapes(items, num_buckets=training.NUM_BUCKETS), seed=0, epoch=0, **layout
    ):
        scores = np.asarray(score(params, *sharding.rows(batch.sequences, mesh))).reshape(-1, 2)
        right += (scores[:, 0] > scores[:, 1])[: len(batch.examples)].tolist()
    share = float(np.mean(right))
    error = (share * (1 - share) / len(right)) ** 0.5
    return {"eval/accuracy": share, "eval/accuracy_stderr": error, "eval/num_pairs": len(right)}
