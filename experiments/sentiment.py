"""RLHF on real text: from labelled sentences to a policy that people like better.

A language model learns to write sentences, a reward model learns from preferences which of two
sentences people like better, PPO teaches the language model to write what the reward model likes,
and a judge of another kind, who has seen neither, says whether it worked.

    python experiments/sentiment.py --data FOLDER --out runs/mine

FOLDER holds `*.pos` and `*.neg`, one text a line; without it, text is generated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax import Array
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import rlhfjax.models as zoo
from rlhfjax import checkpoint, kl, masked, rollout
from rlhfjax.algorithms import ppo, reward_model, sft
from rlhfjax.cli.metrics import MetricsLog
from rlhfjax.cli.plots import curves
from rlhfjax.cli.progress import progress
from rlhfjax.cli.samples import write_samples
from rlhfjax.cli.timing import Clock, Compilations
from rlhfjax.data.batches import (
    Padded,
    bucket_batches,
    bucket_lengths,
    bucket_pair_batches,
    left_pad,
    right_pad,
)
from rlhfjax.data.generated import generated_corpus
from rlhfjax.data.preferences import pair_by_label
from rlhfjax.data.text import DataError, LabelledText, read_labelled, split_by_hash
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


@dataclass(frozen=True)
class SFTArgs:
    """Language-model training."""

    epochs: int = 4
    """Passes over the training texts."""
    batch: int = 32
    """Texts in an update."""
    learning_rate: float = 1.5e-3
    """Peak of a cosine schedule."""
    buckets: int = 4
    """Sequence lengths to compile for; more of them means less padding."""


@dataclass(frozen=True)
class RewardArgs:
    """Training of the reward model."""

    epochs: int = 4
    """Passes over the preference pairs; the best one on validation pairs is kept."""
    batch: int = 32
    """Pairs in an update."""
    learning_rate: float = 5e-4
    """Peak of a cosine schedule."""
    buckets: int = 2
    """Sequence lengths to compile for."""


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
    model: ModelArgs = field(default_factory=ModelArgs)
    sft: SFTArgs = field(default_factory=SFTArgs)
    reward: RewardArgs = field(default_factory=RewardArgs)
    ppo: PPOArgs = field(default_factory=PPOArgs)


def main(args: Args) -> dict[str, object]:
    """Tells the whole story and returns what `summary.json` holds."""
    check(args)
    clock, compilations = Clock(), Compilations()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").unlink(missing_ok=True)
    write_json(args.out / "config.json", dataclasses.asdict(args) | {"versions": versions()})
    keys = jax.random.split(jax.random.key(args.seed), 4)

    # 1. Text: A will train the reward model, B the judge, both the language model.
    texts = read_labelled(args.data) if args.data else generated_corpus(6000, seed=args.seed)
    splits = split(texts)
    train_texts = [text.text for text in splits["train_a"] + splits["train_b"]]
    codec = Codec(train_tokenizer(train_texts, args.model.vocab), args)
    codec.tokenizer.save(str(args.out / "tokenizer.json"))
    truncated = codec.num_truncated([text.text for part in splits.values() for text in part])
    if truncated:
        print(f"{truncated} texts are longer than --model.context and lose what is beyond it")

    # 2. The judge is of another kind and stands for the people whom the reward model imitates.
    judge, baseline = bag_of_words(splits["train_b"]), bag_of_words(splits["train_a"])

    model, scorer = build_models(args.model, codec.tokenizer.get_vocab_size())
    prompts = {name: codec.prompts(splits[name]) for name in ("validation", "test")}
    respond = jax.jit(partial(generate, model=model, num_tokens=args.ppo.response_tokens))

    with MetricsLog(args.out / "metrics.jsonl") as log:
        # 3. Supervised fine-tuning.
        with clock("sft"):
            policy = train_sft(args, model, codec.encode(train_texts), keys[0], log)
            before = respond(policy, *prompts["test"], keys[3])

        # 4. The reward model, normalised on the policy's own samples before and after training.
        with clock("reward"):
            own = respond(policy, *prompts["validation"], keys[3])
            start = {"backbone": policy, "head": scorer.init(keys[1])["head"]}
            reward = train_reward(args, scorer, normalise(scorer, start, own), splits, codec, log)
            reward = normalise(scorer, reward, own)
            test_scores = score_texts(scorer, reward, codec, splits["test"])

        # 5. PPO on the reward model under a KL penalty.
        with clock("ppo"):
            run = train_ppo(
                args, model, scorer, policy, reward, prompts["validation"], codec, judge, keys[2],
                log, compilations,
            )  # fmt: skip

    # 6. Fresh samples to test prompts for the judge and for the reader.
    after = respond(run.policy, *prompts["test"], keys[3])
    texts_before, texts_after = codec.texts(before), codec.texts(after)
    verdicts_before, verdicts_after = judge.predict(texts_before), judge.predict(texts_after)
    score = jax.jit(partial(reward_of, scorer))
    write_samples(
        args.out / "samples.md",
        codec.decode(before.prompts)[:SHOWN],
        codec.decode(before.responses)[:SHOWN],
        codec.decode(after.responses)[:SHOWN],
        scores_before=score(reward, before)[:SHOWN],
        scores_after=score(reward, after)[:SHOWN],
        gold_before=verdicts_before[:SHOWN],
        gold_after=verdicts_after[:SHOWN],
    )
    curves(run.rows, args.out / "curves.png")
    checkpoint.save(args.out / "checkpoint", {"policy": run.policy, "reward": reward})
    labels = [text.label for text in splits["test"]]
    summary = {
        "reward/pairwise_accuracy": pairwise_accuracy(test_scores, labels),
        "reward/baseline_pairwise_accuracy": pairwise_accuracy(
            baseline.decision_function([text.text for text in splits["test"]]), labels
        ),
        "gold/test_accuracy": judge.score([text.text for text in splits["test"]], labels),
        "gold/positive_rate_before": float(np.mean(verdicts_before)),
        "gold/positive_rate_after": float(np.mean(verdicts_after)),
        "objective/kl": float(divergence(after, policy, model=model)),
        "samples/distinct_fraction": len(set(texts_after)) / len(texts_after),
        "ppo/first_ratio_error": max(row["ppo/first_ratio_error"] for row in run.rows),
        "compilations_after_first_iteration": run.compilations_after_first_iteration,
        "data/texts": {name: len(members) for name, members in splits.items()},
        "data/truncated": truncated,
        **{f"seconds/{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds/compile": compilations.seconds,
        "seconds/total": clock.total(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    write_json(args.out / "summary.json", summary)
    return summary


def check(args: Args) -> None:
    """Refuses what would fail only after minutes of training."""
    longest = args.ppo.prompt_tokens + args.ppo.response_tokens
    if longest > args.model.context:
        raise ValueError(
            f"--ppo.prompt-tokens and --ppo.response-tokens need {longest} positions, "
            f"--model.context has {args.model.context}: raise it or shorten either"
        )
    if args.ppo.prompts % args.ppo.minibatches:
        raise ValueError(
            f"--ppo.minibatches {args.ppo.minibatches} does not divide "
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
    args: Args, model: LanguageModel, texts: list[list[int]], key: Array, log: MetricsLog
) -> Params:
    """Maximum likelihood of the texts."""
    settings = args.sft
    lengths = bucket_lengths([len(t) for t in texts], num_buckets=settings.buckets)
    batches = partial(
        bucket_batches,
        texts,
        batch_size=settings.batch,
        lengths=lengths,
        pad_token=PAD,
        seed=args.seed,
    )
    num_updates = settings.epochs * sum(1 for _ in batches(epoch=0))
    optimizer = adamw(settings.learning_rate, num_updates)
    step = sft.make_step(model, optimizer)
    state = sft.init(jax.jit(model.init)(key), optimizer)
    with progress(num_updates, "sft") as advance:
        for epoch in range(settings.epochs):
            for tokens, mask in batches(epoch=epoch):
                state, metrics = step(state, tokens, mask, mask)
                row = log.write("sft", int(state.step), metrics)
                advance(loss=row["loss"])
    return state.params


def train_reward(
    args: Args,
    scorer: ScalarModel,
    params: Params,
    splits: dict[str, list[LabelledText]],
    codec: Codec,
    log: MetricsLog,
) -> Params:
    """Bradley-Terry on pairs of A, new ones in every epoch; keeps the best epoch on validation."""
    settings = args.reward
    size = {"batch_size": settings.batch, "pad_token": PAD, "seed": args.seed}
    epochs = []
    for epoch in range(settings.epochs):
        pairs = pair_by_label(splits["train_a"], seed=args.seed + epoch)
        chosen, rejected = (codec.encode(side) for side in zip(*pairs, strict=True))
        epochs.append(list(zip(chosen, rejected, strict=True)))
    longest = [max(map(len, pair)) for pair in epochs[0]]
    lengths = [*bucket_lengths(longest, num_buckets=settings.buckets)[:-1], args.model.context]
    batches = [
        list(bucket_pair_batches(pairs, lengths=lengths, epoch=epoch, **size))
        for epoch, pairs in enumerate(epochs)
    ]
    num_updates = sum(map(len, batches))
    optimizer = adamw(settings.learning_rate, num_updates)
    step = reward_model.make_step(scorer, optimizer)
    state = reward_model.init(params, optimizer)
    best, labels = (-1.0, params), [text.label for text in splits["validation"]]
    with progress(num_updates, "reward") as advance:
        for epoch in batches:
            for (chosen, chosen_mask), (rejected, rejected_mask) in epoch:
                none = chosen[:, :0], chosen_mask[:, :0]
                batch = PreferenceBatch(*none, chosen, chosen_mask, rejected, rejected_mask)
                state, metrics = step(state, batch)
                row = log.write("reward", int(state.step), metrics)
                advance(loss=row["loss"], accuracy=row["accuracy"])
            scores = score_texts(scorer, state.params, codec, splits["validation"])
            accuracy = pairwise_accuracy(scores, labels)
            log.write("reward_validation", int(state.step), {"accuracy": accuracy})
            if accuracy > best[0]:
                best = accuracy, jax.device_get(state.params)
    return best[1]


def score_texts(
    scorer: ScalarModel, params: Params, codec: Codec, texts: Sequence[LabelledText]
) -> np.ndarray:
    """The reward model's score of each text."""
    ids = codec.encode([text.text for text in texts])
    tokens, mask = right_pad(ids, num_rows=len(ids), length=codec.args.model.context, pad_token=PAD)
    return np.asarray(jax.jit(partial(reward_model.score, scorer))(params, tokens, mask))


def reward_of(scorer: ScalarModel, params: Params, rollout: Rollout) -> Array:
    """The reward model's score of prompts with their responses."""
    first = rollout.prompts.shape[1]
    return reward_model.score(scorer, params, rollout.tokens, rollout.attention_mask, first=first)


def normalise(scorer: ScalarModel, params: Params, rollout: Rollout) -> Params:
    """The reward model whose scores of the rollout have mean 0 and variance 1."""
    scores = np.asarray(jax.jit(partial(reward_of, scorer))(params, rollout))
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
    """Samples one response to each prompt."""
    return rollout.generate(
        model, params, prompts, prompt_mask, key,
        num_tokens=num_tokens, pad_token=PAD, end_token=END,
    )  # fmt: skip


def divergence(samples: Rollout, ref_params: Params, *, model: LanguageModel) -> Array:
    """KL of the sampling policy from the reference, nats a response."""
    mask = samples.response_mask
    reference, _ = response_log_probs(
        model, ref_params, samples.tokens, samples.attention_mask, mask.shape[1]
    )
    return masked.sum(kl.k1(samples.log_probs, reference), mask, axis=1).mean()


class PPORun(NamedTuple):
    """What PPO leaves behind."""

    policy: Params
    rows: list[dict[str, object]]
    compilations_after_first_iteration: int


def train_ppo(
    args: Args,
    model: LanguageModel,
    scorer: ScalarModel,
    policy: Params,
    reward: Params,
    prompts: Padded,
    codec: Codec,
    judge: Pipeline,
    key: Array,
    log: MetricsLog,
    compilations: Compilations,
) -> PPORun:
    """Moves the policy towards what the reward model likes; the judge watches."""
    settings = args.ppo
    actor_critic = zoo.separate_trunks(model, scorer)
    num_updates = settings.iterations * settings.epochs * settings.minibatches
    schedule = optax.linear_schedule(
        settings.learning_rate, 0.1 * settings.learning_rate, num_updates
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))
    config = ppo.Config(
        num_tokens=settings.response_tokens,
        pad_token=PAD,
        end_token=END,
        num_epochs=settings.epochs,
        num_minibatches=settings.minibatches,
    )
    hyper = ppo.Hyperparameters(
        gae_lambda=settings.gae_lambda,
        kl_target=settings.kl_target,
        kl_horizon=settings.kl_horizon,
    )

    @partial(jax.jit, donate_argnums=0)
    def iterate(state: ppo.State, prompts: Padded, ref: Params, reward: Params):
        samples = ppo.sample(state, *prompts, hyper, model=actor_critic, config=config)
        scores = reward_of(scorer, reward, samples)
        state, metrics = ppo.learn(
            state, samples, scores, ref, hyper,
            model=actor_critic, optimizer=optimizer, config=config,
        )  # fmt: skip
        return state, metrics, samples

    params = {"policy": policy, "value": reward}
    state = ppo.init(params, optimizer, key, kl_coef=settings.kl_coef)
    rows: list[dict[str, Any]] = []
    with progress(settings.iterations, "ppo") as advance:
        for iteration in range(settings.iterations):
            batch = draw(prompts, settings.prompts, iteration, args.seed)
            state, metrics, samples = iterate(state, batch, policy, reward)
            liked = {"gold/positive_rate": np.mean(judge.predict(codec.texts(samples)))}
            rows.append(log.write("ppo", iteration, metrics | liked))
            numbers = rows[-1]
            advance(
                score=numbers["objective/scores"],
                gold=numbers["gold/positive_rate"],
                kl=numbers["objective/kl"],
            )
            if iteration == 0:
                compiled = compilations.count
    return PPORun(state.params["policy"], rows, compilations.count - compiled)


def draw(prompts: Padded, number: int, iteration: int, seed: int) -> Padded:
    """The prompts of an iteration: all of them once, in random order, then again in another."""
    total = len(prompts.tokens)
    places = np.arange(iteration * number, (iteration + 1) * number)
    passes = {n: np.random.default_rng([seed, n]).permutation(total) for n in set(places // total)}
    rows = np.array([passes[place // total][place % total] for place in places])
    return Padded(prompts.tokens[rows], prompts.mask[rows])


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {name: version(name) for name in ("rlhfjax", "jax", "jaxlib", "flax", "optax")}


def write_json(path: Path, content: dict[str, object]) -> None:
    """Readable JSON; paths as text."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Args)), indent=2))
