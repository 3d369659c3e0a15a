"""RLHF on real text: from labelled sentences to a policy that people like better.

A language model learns to write sentences, a reward model learns from preferences which of two
sentences people like better, PPO teaches the language model to write what the reward model likes,
and a judge of another kind, who has seen neither, says whether it worked.

    python experiments/sentiment.py --data FOLDER --out runs/mine

FOLDER holds `*.pos` and `*.neg`, one text a line; without it, text is generated. A run that was
broken off goes on with `--resume`, to the same end. It uses all devices, and several processes
when they are started together (docs/scaling.md).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import rlhfjax.models as zoo
from rlhfjax import checkpoint, kl, masked, rollout, sharding
from rlhfjax.algorithms import dpo, grpo, ppo, reward_model, sft
from rlhfjax.algorithms.iteration import Reward
from rlhfjax.cli import memory, processes
from rlhfjax.cli.plots import curves
from rlhfjax.cli.run import Run, Trained
from rlhfjax.cli.samples import write_samples
from rlhfjax.cli.timing import Clock
from rlhfjax.data.batches import (
    Padded,
    PaddedPair,
    bucket_batches,
    bucket_lengths,
    bucket_pair_batches,
    draw,
    left_pad,
    right_pad,
)
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.generated import generated_corpus
from rlhfjax.data.preferences import pair_by_label
from rlhfjax.data.text import (
    DataError,
    LabelledText,
    fingerprint,
    read_labelled,
    split_by_hash,
)
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout, ScalarModel

PAD, BEGIN, END = 0, 1, 2
SHOWN = 32
SPLITS = {"train_a": 0.4, "train_b": 0.4, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class ModelArgs:
    """Size of every model."""

    vocab: int = 4096
    """Tokens of the vocabulary, at most."""
    layers: int = 2
    """Blocks of the transformer."""
    width: int = 128
    """Size of the hidden states."""
    heads: int = 4
    """Attention heads."""
    context: int = 96
    """Longest sequence; longer texts are cut off there."""
    remat: bool = False
    """Compute activations again in the backward pass: less memory, the same result."""


@dataclass(frozen=True)
class SFTArgs:
    """Language-model training."""

    epochs: int = 4
    """Passes over the training texts."""
    batch: int = 32
    """Texts in an update."""
    micro_batches: int = 1
    """Parts of an update, one after the other: less memory, the same result."""
    learning_rate: float = 1.5e-3
    """Peak of a cosine schedule."""
    buckets: int = 4
    """Sequence lengths to compile for; more of them means less padding."""
    save_every: int = 200
    """Updates between two checkpoints."""


@dataclass(frozen=True)
class RewardArgs:
    """Training of the reward model."""

    epochs: int = 4
    """Passes over the preference pairs; the best one on validation pairs is kept."""
    batch: int = 32
    """Pairs in an update."""
    micro_batches: int = 1
    """Parts of an update, one after the other: less memory, the same result."""
    learning_rate: float = 5e-4
    """Peak of a cosine schedule."""
    buckets: int = 2
    """Sequence lengths to compile for."""
    save_every: int = 200
    """Updates between two checkpoints."""


@dataclass(frozen=True)
class PPOArgs:
    """Reinforcement learning."""

    iterations: int = 50
    """Rounds of sampling and learning."""
    prompts: int = 192
    """Prompts in an iteration."""
    prompt_words: int = 3
    """First words of a held-out text that make a prompt."""
    prompt_tokens: int = 10
    """Tokens of a prompt, at most."""
    response_tokens: int = 32
    """Tokens of a response, at most."""
    epochs: int = 2
    """Passes over each batch of rollouts."""
    minibatches: int = 3
    """Updates in each pass."""
    micro_batches: int = 1
    """Parts of an update, one after the other: less memory, the same result."""
    learning_rate: float = 5e-4
    """At the start; falls linearly to a tenth."""
    gae_lambda: float = 1.0
    """λ of GAE; at 1 the advantages have no bias from the value function."""
    kl_coef: float = 0.17
    """Weight of the KL penalty at the start."""
    kl_target: float = 8.0
    """Nats a response that the weight is adapted to."""
    kl_horizon: float = 2000.0
    """Samples in which the weight adapts; inf keeps it."""
    save_every: int = 10
    """Iterations between two checkpoints."""


@dataclass(frozen=True)
class GRPOArgs:
    """What GRPO has in place of PPO's value function; all else is as --ppo says."""

    group: int = 8
    """Responses to each prompt; there are as many prompts fewer."""
    kl_coef: float = 0.17
    """Weight of the KL penalty."""


@dataclass(frozen=True)
class DPOArgs:
    """Learning from the preference pairs themselves, without a reward."""

    epochs: int = 2
    """Passes over the preference pairs."""
    batch: int = 32
    """Pairs in an update."""
    micro_batches: int = 1
    """Parts of an update, one after the other: less memory, the same result."""
    learning_rate: float = 2e-4
    """Peak of a cosine schedule."""
    beta: float = 0.1
    """β: how dear it is to leave the reference."""
    buckets: int = 2
    """Sequence lengths to compile for."""
    save_every: int = 200
    """Updates between two checkpoints."""


@dataclass(frozen=True)
class MeshArgs:
    """How the devices share the work."""

    data: int | None = None
    """Parts of each batch; all devices that the other two leave, if it is not given."""
    fsdp: int = 1
    """Parts of each batch, and of parameters and optimiser state."""
    tensor: int = 1
    """Parts of each matrix."""


@dataclass(frozen=True)
class Args:
    """Teaches a small language model to write what people prefer."""

    data: Path | None = None
    """Folder with *.pos (preferred) and *.neg files, one text a line; without it, text is
    generated."""
    out: Path = Path("runs/sentiment")
    """Folder for everything that the run leaves behind."""
    seed: int = 0
    """Decides initial parameters, order of data and samples."""
    algorithm: Literal["ppo", "grpo", "dpo"] = "ppo"
    """What teaches the policy the preferences."""
    resume: bool = False
    """Go on with the run in --out, if there is one."""
    keep: int = 2
    """Checkpoints of each stage that are kept."""
    distributed: bool = False
    """Ask the cluster (Cloud TPU, SLURM, GKE) for the other processes of this run."""
    heartbeat: int = 100
    """Seconds after which a silent process is taken for dead, and the run ends."""
    model: ModelArgs = field(default_factory=ModelArgs)
    sft: SFTArgs = field(default_factory=SFTArgs)
    reward: RewardArgs = field(default_factory=RewardArgs)
    ppo: PPOArgs = field(default_factory=PPOArgs)
    grpo: GRPOArgs = field(default_factory=GRPOArgs)
    dpo: DPOArgs = field(default_factory=DPOArgs)
    mesh: MeshArgs = field(default_factory=MeshArgs)


# What may be another when a run is resumed: where it is, and how its work is shared.
MAY_CHANGE = (
    "data", "out", "resume", "keep", "distributed", "heartbeat", "mesh", "save_every",
    "micro_batches", "remat",
)  # fmt: skip


def main(args: Args) -> dict[str, object]:
    """Tells the whole story and returns what `summary.json` holds."""
    check(args)
    processes.join(cluster=args.distributed, heartbeat_seconds=args.heartbeat)
    clock = Clock()
    mesh = sharding.mesh(**vars(args.mesh))
    texts = read_labelled(args.data) if args.data else generated_corpus(6000, seed=args.seed)
    with (
        jax.set_mesh(mesh),
        Run(
            args.out,
            dataclasses.asdict(args),
            may_change=MAY_CHANGE,
            mesh=mesh,
            resume=args.resume,
            keep=args.keep,
            fingerprint=fingerprint(texts),
        ) as run,
    ):
        return story(args, texts, run, clock)


def story(args: Args, texts: list[LabelledText], run: Run, clock: Clock) -> dict[str, object]:
    """From texts to a policy that people like better."""
    keys = [sharding.put(key, run.mesh) for key in jax.random.split(jax.random.key(args.seed), 4)]

    # 1. Text: A will train the reward model, B the judge, both the language model.
    splits = split(texts)
    train_texts = [text.text for text in splits["train_a"] + splits["train_b"]]
    codec = Codec(train_tokenizer(train_texts, args.model.vocab), args)
    truncated = codec.num_truncated([text.text for part in splits.values() for text in part])
    if truncated and run.is_first:
        print(f"{truncated} texts are longer than --model.context and lose what is beyond it")

    # 2. The judge is of another kind and stands for the people whom the reward model imitates.
    judge, baseline = bag_of_words(splits["train_b"]), bag_of_words(splits["train_a"])

    model, scorer = build_models(args.model, codec.tokenizer.get_vocab_size())
    prompts = {name: codec.prompts(splits[name]) for name in ("validation", "test")}
    generate_all = jax.jit(partial(generate, model=model, num_tokens=args.ppo.response_tokens))

    def respond(policy: Params, prompts: Padded) -> Rollout:
        return generate_all(policy, *sharding.rows(prompts, run.mesh), keys[3])

    # 3. Supervised fine-tuning.
    with clock("sft"):
        policy = train_sft(args, model, codec.encode(train_texts), keys[0], run)
        before = respond(policy, prompts["test"])

    # 4. The reward model, normalised on the policy's own samples before and after training.
    with clock("reward"):
        own = respond(policy, prompts["validation"])
        reward_of = reward_model.as_reward(scorer, model)
        normalise = jax.jit(partial(normalised, reward_of))
        start = jax.jit(partial(headed, scorer))(policy, keys[1])
        score = jax.jit(partial(scores_of, scorer))
        reward = train_reward(args, scorer, score, normalise(start, own), splits, codec, run)
        reward = normalise(reward, own)
        test_scores = score_texts(score, reward, codec, splits["test"], run)

    # 5. Learning from the reward model or from the pairs, under a KL penalty.
    with clock(args.algorithm):
        if args.algorithm == "dpo":
            trained = train_dpo(args, model, policy, splits, codec, run)
            new_policy = trained.state.params
        else:
            algorithm = {"ppo": proximal, "grpo": grouped}[args.algorithm](args, model, scorer)
            trained = train_on_samples(
                args, algorithm, reward_of, policy, reward, prompts["validation"], codec, judge,
                keys[2], run,
            )  # fmt: skip
            new_policy = algorithm.policy_of(trained.state.params)

    # 6. Fresh samples to test prompts for the judge and for the reader.
    after = respond(new_policy, prompts["test"])
    score_rollout = jax.jit(reward_of)
    scores_before, scores_after = score_rollout(reward, before), score_rollout(reward, after)
    kl_after = jax.jit(partial(divergence, model=model))(after, policy)
    state_digest = checkpoint.digest(trained.state)
    checkpoint.save(args.out / "checkpoint", {"policy": new_policy, "reward": reward})
    if not run.is_first:
        return {}
    texts_before, texts_after = codec.texts(before), codec.texts(after)
    verdicts_before, verdicts_after = judge.predict(texts_before), judge.predict(texts_after)
    codec.tokenizer.save(str(args.out / "tokenizer.json"))
    write_samples(
        args.out / "samples.md",
        codec.decode(before.prompts)[:SHOWN],
        codec.decode(before.responses)[:SHOWN],
        codec.decode(after.responses)[:SHOWN],
        scores_before=scores_before[:SHOWN],
        scores_after=scores_after[:SHOWN],
        gold_before=verdicts_before[:SHOWN],
        gold_after=verdicts_after[:SHOWN],
    )
    if args.algorithm == "ppo":
        curves(trained.rows, args.out / "curves.png")
    labels = [text.label for text in splits["test"]]
    summary = {
        "reward/pairwise_accuracy": pairwise_accuracy(test_scores, labels),
        "reward/baseline_pairwise_accuracy": pairwise_accuracy(
            baseline.decision_function([text.text for text in splits["test"]]), labels
        ),
        "gold/test_accuracy": judge.score([text.text for text in splits["test"]], labels),
        "gold/positive_rate_before": float(np.mean(verdicts_before)),
        "gold/positive_rate_after": float(np.mean(verdicts_after)),
        "objective/kl": float(kl_after),
        "samples/distinct_fraction": len(set(texts_after)) / len(texts_after),
        "state/digest": state_digest,
        "compilations_after_first_iteration": trained.recompilations,
        "data/texts": {name: len(members) for name, members in splits.items()},
        "data/truncated": truncated,
        **{f"seconds/{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds/compile": run.compilations.seconds,
        "seconds/total": clock.total(),
        "device": jax.devices()[0].device_kind,
        "versions": checkpoint.versions(),
    }
    if args.algorithm == "ppo":
        errors = [row["ppo/first_ratio_error"] for row in trained.rows]
        summary["ppo/first_ratio_error"] = None if None in errors else max(errors)
    run.write("summary.json", summary)
    return summary


def check(args: Args) -> None:
    """Refuses what would fail only after minutes of training."""
    longest = args.ppo.prompt_tokens + args.ppo.response_tokens
    if longest > args.model.context:
        raise ValueError(
            f"--ppo.prompt-tokens and --ppo.response-tokens need {longest} positions, "
            f"--model.context has {args.model.context}: raise it or shorten either"
        )
    group = args.grpo.group if args.algorithm == "grpo" else 1
    if args.ppo.prompts % (args.ppo.minibatches * group):
        raise ValueError(
            f"--ppo.minibatches {args.ppo.minibatches} of groups of {group} do not divide "
            f"--ppo.prompts {args.ppo.prompts}"
        )


def split(texts: Sequence[LabelledText]) -> dict[str, list[LabelledText]]:
    """Parts that depend on nothing but each text."""
    parts = split_by_hash(texts, SPLITS)
    for name, members in parts.items():
        if len({text.label for text in members}) < 2:
            raise DataError(
                f"{len(texts)} texts are too few: part {name!r} got {len(members)} of them, and "
                "not of both labels; give more text"
            )
    return parts


class Codec:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Tokenizer, args: Args) -> None:
        self.tokenizer, self.args = tokenizer, args

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[BEGIN, *e.ids, END] for e in self.tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Whole texts between BEGIN and END; what is longer than the context loses its rest."""
        return [ids[: self.args.model.context] for ids in self._ids(texts)]

    def num_truncated(self, texts: Sequence[str]) -> int:
        """Texts that are longer than the context."""
        return sum(len(ids) > self.args.model.context for ids in self._ids(texts))

    def prompts(self, texts: Sequence[LabelledText]) -> Padded:
        """The first words of each text after BEGIN, left-padded."""
        words = [" ".join(text.text.split()[: self.args.ppo.prompt_words]) for text in texts]
        ids = [[BEGIN, *e.ids] for e in self.tokenizer.encode_batch(words)]
        length = self.args.ppo.prompt_tokens
        return left_pad([i[:length] for i in ids], length=length, pad_token=PAD)

    def decode(self, tokens: Array) -> list[str]:
        """Texts without the special tokens."""
        return self.tokenizer.decode_batch(np.asarray(tokens).tolist())

    def texts(self, rollout: Rollout) -> list[str]:
        """Prompts with their responses."""
        return [text.strip() for text in self.decode(rollout.tokens)]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bag_of_words(texts: Sequence[LabelledText]) -> Pipeline:
    """Logistic regression on the words of a text."""
    words = CountVectorizer(binary=True, token_pattern=r"\S+")
    classifier = make_pipeline(words, LogisticRegression(max_iter=1000))
    return classifier.fit(*zip(*texts, strict=True))


def pairwise_accuracy(scores: np.ndarray, labels: Sequence[bool]) -> float:
    """How often a positive text scores above a negative one, over all such pairs."""
    scores, positive = np.asarray(scores), np.asarray(labels)
    return float((scores[positive][:, None] > scores[~positive][None, :]).mean())


def build_models(args: ModelArgs, vocab_size: int) -> tuple[LanguageModel, ScalarModel]:
    """The decoder, and a scalar head on the same architecture."""
    config = zoo.DecoderConfig(
        vocab_size=vocab_size,
        context_length=args.context,
        width=args.width,
        num_layers=args.layers,
        num_heads=args.heads,
        remat=args.remat,
    )
    model = zoo.decoder(config)
    head = zoo.linear_head(args.width, stddev=(args.width + 1) ** -0.5)
    return model, zoo.scalar_model(model, head)


def adamw(peak: float, num_updates: int) -> optax.GradientTransformation:
    """AdamW with a short warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(100, num_updates // 10), max(num_updates, 2)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))


def train_sft(
    args: Args, model: LanguageModel, texts: list[list[int]], key: Array, run: Run
) -> Params:
    """Maximum likelihood of the texts."""
    settings = args.sft
    lengths = bucket_lengths([len(t) for t in texts], num_buckets=settings.buckets)
    part = sharding.part_of_process(run.mesh)

    def epoch(number: int, start: int) -> Iterator[Padded]:
        return bucket_batches(
            texts, batch_size=settings.batch, lengths=lengths, pad_token=PAD, seed=args.seed,
            epoch=number, start=start, part=part,
        )  # fmt: skip

    num_updates = settings.epochs * sum(1 for _ in epoch(0, 0))
    optimizer = adamw(settings.learning_rate, num_updates)
    update = memory.explained(
        sft.make_step(model, optimizer, num_micro_batches=settings.micro_batches)
    )

    def step(state: sft.TrainState, batch: Padded) -> tuple[sft.TrainState, Any]:
        tokens, mask = sharding.rows_of_process(batch, run.mesh)
        return update(state, tokens, mask, mask)

    trained = run.train(
        "sft",
        lambda key: sft.init(model.init(key), optimizer),
        key,
        step=step,
        batches=partial(batches_from, epoch=epoch),
        num_steps=num_updates,
        save_every=settings.save_every,
        show={"loss": "loss"},
    )
    return trained.state.params


class Pairs:
    """Preference pairs of A, new ones in every epoch."""

    def __init__(
        self, texts: list[LabelledText], codec: Codec, settings: RewardArgs | DPOArgs, run: Run
    ) -> None:
        self.texts, self.codec, self.settings = texts, codec, settings
        self.part = sharding.part_of_process(run.mesh)
        longest = [max(map(len, pair)) for pair in self.of_epoch(0)]
        context = codec.args.model.context
        self.lengths = [*bucket_lengths(longest, num_buckets=settings.buckets)[:-1], context]
        self.num_batches = [sum(1 for _ in self.epoch(n, 0)) for n in range(settings.epochs)]

    def of_epoch(self, number: int) -> list[tuple[list[int], list[int]]]:
        pairs = pair_by_label(self.texts, seed=self.codec.args.seed + number)
        chosen, rejected = (self.codec.encode(side) for side in zip(*pairs, strict=True))
        return list(zip(chosen, rejected, strict=True))

    def epoch(self, number: int, start: int) -> Iterator[PaddedPair]:
        return bucket_pair_batches(
            self.of_epoch(number), batch_size=self.settings.batch, lengths=self.lengths,
            pad_token=PAD, seed=self.codec.args.seed, epoch=number, start=start, part=self.part,
        )  # fmt: skip


def preference_batch(pair: PaddedPair, run: Run, *, num_prompt_tokens: int) -> PreferenceBatch:
    """Pairs of texts, the first tokens of which are the prompt."""
    (chosen, chosen_mask), (rejected, rejected_mask) = sharding.rows_of_process(pair, run.mesh)
    n = num_prompt_tokens
    return PreferenceBatch(
        chosen[:, :n], chosen_mask[:, :n], chosen[:, n:], chosen_mask[:, n:],
        rejected[:, n:], rejected_mask[:, n:],
    )  # fmt: skip


def train_reward(
    args: Args,
    scorer: ScalarModel,
    score: Callable[..., Array],
    params: Params,
    splits: dict[str, list[LabelledText]],
    codec: Codec,
    run: Run,
) -> Params:
    """Bradley-Terry on pairs of A; keeps the best epoch on validation."""
    settings = args.reward
    pairs = Pairs(splits["train_a"], codec, settings, run)
    ends = set(np.cumsum(pairs.num_batches).tolist())
    num_updates = max(ends)
    optimizer = adamw(settings.learning_rate, num_updates)
    update = memory.explained(
        reward_model.make_step(scorer, optimizer, num_micro_batches=settings.micro_batches)
    )
    labels = [text.label for text in splits["validation"]]

    @partial(jax.jit, donate_argnums=0)
    def keep_better(state: BestSoFar, accuracy: Array) -> BestSoFar:
        better = accuracy > state.accuracy
        best = jax.tree.map(partial(jnp.where, better), state.train.params, state.best)
        return BestSoFar(state.train, best, jnp.maximum(accuracy, state.accuracy))

    def start(params: Params) -> BestSoFar:
        train = reward_model.init(params, optimizer)
        return BestSoFar(train, jax.tree.map(jnp.copy, params), jnp.float32(-1))

    def step(state: BestSoFar, pair: PaddedPair) -> tuple[BestSoFar, Any]:
        batch = preference_batch(pair, run, num_prompt_tokens=0)
        train, metrics = update(state.train, batch)
        state = state._replace(train=train)
        if int(train.step) in ends:
            scores = score_texts(score, train.params, codec, splits["validation"], run)
            accuracy = pairwise_accuracy(scores, labels)
            metrics |= {"validation/accuracy": accuracy}
            state = keep_better(state, np.float32(accuracy))
        return state, metrics

    trained = run.train(
        "reward",
        start,
        params,
        step=step,
        batches=partial(batches_from, epoch=pairs.epoch),
        num_steps=num_updates,
        save_every=settings.save_every,
        show={"loss": "loss", "accuracy": "accuracy"},
    )
    return trained.state.best


class BestSoFar(NamedTuple):
    """Training of the reward model, and the best that it has come to."""

    train: reward_model.TrainState
    best: Params
    accuracy: Array


def score_texts(
    score: Callable[..., Array],
    params: Params,
    codec: Codec,
    texts: Sequence[LabelledText],
    run: Run,
) -> np.ndarray:
    """The score of each text; `score` is that of rows, compiled."""
    ids = codec.encode([text.text for text in texts])
    size = {"num_rows": -(-len(ids) // 64) * 64, "length": codec.args.model.context}
    batch = sharding.rows(right_pad(ids, **size, pad_token=PAD), run.mesh)
    return np.asarray(score(params, *batch))[: len(ids)]


def scores_of(scorer: ScalarModel, params: Params, tokens: Array, mask: Array) -> Array:
    """The reward model's score of each row, for every process to read."""
    return sharding.whole(reward_model.score(scorer, params, tokens, mask))


def headed(scorer: ScalarModel, policy: Params, key: Array) -> Params:
    """A reward model that begins as the policy, with a new head."""
    return {"backbone": policy, "head": scorer.init(key)["head"]}


def normalised(reward: Reward, params: Params, rollout: Rollout) -> Params:
    """The reward model whose scores of the rollout have mean 0 and variance 1."""
    scores = reward(params, rollout)
    return params | {"head": zoo.rescale(params["head"], mean=scores.mean(), std=scores.std())}


def generate(
    params: Params,
    prompts: Array,
    prompt_mask: Array,
    key: Array,
    *,
    model: LanguageModel,
    num_tokens: int,
) -> Rollout:
    """Samples one response to each prompt, for every process to read."""
    return sharding.whole(
        rollout.generate(
            model, params, prompts, prompt_mask, key,
            num_tokens=num_tokens, pad_token=PAD, end_token=END,
        )
    )  # fmt: skip


def divergence(samples: Rollout, ref_params: Params, *, model: LanguageModel) -> Array:
    """KL of the sampling policy from the reference, nats a response."""
    mask = samples.response_mask
    reference, _ = response_log_probs(
        model, ref_params, samples.tokens, samples.attention_mask, mask.shape[1]
    )
    return masked.sum(kl.k1(samples.log_probs, reference), mask, axis=1).mean()


class Algorithm(NamedTuple):
    """What learns from its own samples.

    Attributes:
      start: `(policy, reward, key) -> state`.
      sample: `(state, prompts, prompt_mask) -> rollout`.
      learn: `(state, rollout, scores, reference) -> (state, metrics)`.
      policy_of: the policy's parameters among those of the state.
      num_prompts: in an iteration.
    """

    start: Callable[..., Any]
    sample: Callable[..., Rollout]
    learn: Callable[..., tuple[Any, dict[str, Array]]]
    policy_of: Callable[[Params], Params]
    num_prompts: int


def falling_adam(settings: PPOArgs) -> optax.GradientTransformation:
    """Adam at a learning rate that falls linearly to a tenth."""
    schedule = optax.linear_schedule(
        settings.learning_rate,
        0.1 * settings.learning_rate,
        settings.iterations * settings.epochs * settings.minibatches,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


def lengths_and_passes(settings: PPOArgs) -> dict[str, int]:
    """What the configs of the algorithms have in common."""
    return {
        "num_tokens": settings.response_tokens,
        "pad_token": PAD,
        "end_token": END,
        "num_epochs": settings.epochs,
        "num_minibatches": settings.minibatches,
        "num_micro_batches": settings.micro_batches,
    }


def proximal(args: Args, model: LanguageModel, scorer: ScalarModel) -> Algorithm:
    """PPO with a value function that begins as the reward model."""
    settings, optimizer = args.ppo, falling_adam(args.ppo)
    bound = {
        "model": zoo.separate_trunks(model, scorer),
        "config": ppo.Config(**lengths_and_passes(settings)),
    }
    hyper = ppo.Hyperparameters(
        gae_lambda=settings.gae_lambda,
        kl_target=settings.kl_target,
        kl_horizon=settings.kl_horizon,
    )

    def start(policy: Params, reward: Params, key: Array) -> ppo.State:
        params = {"policy": policy, "value": reward}
        return ppo.init(params, optimizer, key, kl_coef=settings.kl_coef)

    return Algorithm(
        start,
        lambda *inputs: ppo.sample(*inputs, hyper, **bound),
        lambda *inputs: ppo.learn(*inputs, hyper, optimizer=optimizer, **bound),
        lambda params: params["policy"],
        settings.prompts,
    )


def grouped(args: Args, model: LanguageModel, _: ScalarModel) -> Algorithm:
    """GRPO."""
    settings, optimizer, group = args.ppo, falling_adam(args.ppo), args.grpo.group
    config = grpo.Config(**lengths_and_passes(settings), group_size=group)
    hyper = grpo.Hyperparameters(kl_coef=args.grpo.kl_coef)
    bound = {"model": model, "config": config}
    return Algorithm(
        lambda policy, reward, key: grpo.init(policy, optimizer, key),
        lambda *inputs: grpo.sample(*inputs, hyper, **bound),
        lambda *inputs: grpo.learn(*inputs, hyper, optimizer=optimizer, **bound),
        lambda params: params,
        settings.prompts // group,
    )


def train_on_samples(
    args: Args,
    algorithm: Algorithm,
    reward_of: Reward,
    policy: Params,
    reward: Params,
    prompts: Padded,
    codec: Codec,
    judge: Pipeline,
    key: Array,
    run: Run,
) -> Trained:
    """Moves the policy towards what the reward model likes; the judge watches."""
    index, count = sharding.part_of_process(run.mesh)
    if algorithm.num_prompts % count:
        raise ValueError(
            f"{algorithm.num_prompts} prompts an iteration do not divide into the parts of {count} "
            "processes: choose --ppo.prompts so that they do"
        )

    @memory.explained
    @sharding.Step
    def iterate(state: Any, prompts: Padded, ref: Params, reward: Params):
        samples = algorithm.sample(state, *prompts)
        scores = reward_of(reward, samples)
        state, metrics = algorithm.learn(state, samples, scores, ref)
        return state, metrics, sharding.whole(samples)

    def step(state: Any, batch: Padded) -> tuple[Any, dict[str, Any]]:
        batch = sharding.rows_of_process(batch, run.mesh)
        state, metrics, samples = iterate(state, batch, policy, reward)
        liked = np.mean(judge.predict(codec.texts(samples)))
        return state, metrics | {"gold/positive_rate": liked}

    def epoch(_: int, start: int) -> Iterator[Padded]:
        size = algorithm.num_prompts // count
        for iteration in range(start, args.ppo.iterations):
            batch = draw(prompts, algorithm.num_prompts, iteration=iteration, seed=args.seed)
            yield Padded(*(x[index * size : (index + 1) * size] for x in batch))

    return run.train(
        args.algorithm,
        algorithm.start,
        policy,
        reward,
        key,
        step=step,
        batches=partial(batches_from, epoch=epoch),
        num_steps=args.ppo.iterations,
        save_every=args.ppo.save_every,
        best="objective/rlhf_reward",
        show={"score": "objective/scores", "gold": "gold/positive_rate", "kl": "objective/kl"},
        first=0,
    )


def train_dpo(
    args: Args,
    model: LanguageModel,
    policy: Params,
    splits: dict[str, list[LabelledText]],
    codec: Codec,
    run: Run,
) -> Trained:
    """DPO on the pairs that the reward model is trained on."""
    settings = args.dpo
    pairs = Pairs(splits["train_a"], codec, settings, run)
    num_updates = sum(pairs.num_batches)
    optimizer = adamw(settings.learning_rate, num_updates)
    update = memory.explained(
        dpo.make_step(model, optimizer, num_micro_batches=settings.micro_batches)
    )
    hyper = dpo.Hyperparameters(beta=settings.beta)

    def step(state: dpo.TrainState, pair: PaddedPair) -> tuple[Any, Any]:
        batch = preference_batch(pair, run, num_prompt_tokens=1)
        return update(state, batch, policy, hyper)

    return run.train(
        "dpo",
        lambda policy: dpo.init(policy, optimizer),
        policy,
        step=step,
        batches=partial(batches_from, epoch=pairs.epoch),
        num_steps=num_updates,
        save_every=settings.save_every,
        show={"loss": "loss", "accuracy": "rewards/accuracies"},
    )


if __name__ == "__main__":
    summary = main(tyro.cli(Args))
    if summary:  # of several processes the first one has it
        print(json.dumps(summary, indent=2))
