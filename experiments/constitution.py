"""A policy that learns from principles: a judge applies them, and no label reaches the policy.

A small language model learns on one half of labelled sentences to answer what the principles of a
constitution ask, and to write again what does not keep to them. It then criticises and revises
samples of the policy, which is fine-tuned on the revisions; it judges pairs of the new samples, a
reward model learns from its probabilities, and PPO moves the policy: once under a principle and
once under its opposite. A classifier of another kind, trained on the other half, says whether the
policy followed.

    python experiments/constitution.py --data FOLDER --out runs/constitution

FOLDER holds `*.pos` and `*.neg`, one text a line; without it, text is generated. The run leaves
`principles.yaml`, what the judge did as records (`revisions_<principle>.jsonl`,
`labels_<principle>.jsonl`), tables of samples (`samples_<principle>.md`), `curves.png` and
`summary.json`. A run that was broken off goes on with `--resume`. After Bai et al. 2022,
Constitutional AI: Harmlessness from AI Feedback.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from jax import Array
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import rlhfjax.models as zoo
from rlhfjax import kl, masked, rollout, sharding
from rlhfjax.algorithms import ppo, reward_model, sft
from rlhfjax.algorithms.train_state import TrainState, apply_gradients
from rlhfjax.cli import plots
from rlhfjax.cli.run import Run, Trained
from rlhfjax.cli.samples import write_samples
from rlhfjax.cli.timing import Clock
from rlhfjax.data.batches import (
    Padded,
    bucket_batches,
    bucket_lengths,
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
from rlhfjax.feedback import judgement, principles, stages, templates
from rlhfjax.feedback.principles import Principle
from rlhfjax.feedback.templates import Field, Vocabulary
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import Params, Rollout

PAD, BEGIN, END = 0, 1, 2
SPECIAL = (PAD, BEGIN, END)
JUDGE, SHOWN = "judge", 32
SPLITS = {"train_a": 0.4, "train_b": 0.4, "validation": 0.1, "test": 0.1}
# The word that tells a principle from its opposite stands last: a small model finds it there.
PRINCIPLE = """\
- name: {name}
  critique_request: "{{response}} is this {name}"
  revision_request: "{{response}}{{critique}} more {name} :{{prompt}}"
  comparison: "first : {{first}} second : {{second}} which one is more {name}"
  question: "{{response}} is this {name}"
  answers:
    comparison: [" first", " second"]
    question: [" yes", " no"]
"""
WANTS_POSITIVE = {"warm": True, "cold": False}


@dataclass(frozen=True)
class Args:
    """Teaches a small language model to follow a principle, and its opposite."""

    data: Path | None = None
    """Folder with *.pos and *.neg files, one text a line; without it, text is generated."""
    out: Path = Path("runs/constitution")
    """Folder for everything that the run leaves behind."""
    seed: int = 0
    """Decides initial parameters, order of data and samples."""
    resume: bool = False
    """Go on with the run in --out, if there is one."""
    texts: int = 6000
    """Texts that are generated where no folder is given."""
    vocab: int = 4096
    """Tokens of the vocabulary, at most."""
    layers: int = 2
    """Blocks of every transformer."""
    width: int = 128
    """Size of the hidden states."""
    heads: int = 4
    """Attention heads."""
    batch: int = 32
    """Texts or pairs in an update of supervised training."""
    sft_epochs: int = 3
    """Passes of the policy over all texts."""
    sft_learning_rate: float = 1.5e-3
    """Peak of a cosine schedule."""
    judge_epochs: int = 6
    """Passes of the judge over its half of the texts."""
    judge_alone: int = 1
    """Passes of these under the first principle alone."""
    judge_learning_rate: float = 1e-3
    """Peak of a cosine schedule."""
    text_weight: float = 0.05
    """Of the judge's loss of a text that it is to write, beside that of an answer."""
    contrast_weight: float = 0.3
    """Of its loss of telling for which principle a text was written."""
    rounds: int = 4
    """Of critique and revision, of the samples that do not keep to the principle."""
    revision_epochs: int = 2
    """Passes of the policy over its revised samples."""
    revision_learning_rate: float = 3e-4
    """Peak of a cosine schedule."""
    pairs: int = 2048
    """Samples that are revised, and pairs that are judged, under each principle; a multiple of
    --judged."""
    judged: int = 256
    """Texts or pairs that are sampled and judged at a time."""
    reward_epochs: int = 2
    """Passes of the reward model over the judged pairs."""
    reward_learning_rate: float = 5e-4
    """Peak of a cosine schedule."""
    prompt_words: int = 3
    """First words of a held-out text that make a prompt."""
    prompt_tokens: int = 10
    """Tokens of a prompt, at most."""
    response_tokens: int = 32
    """Tokens of a response, at most."""
    iterations: int = 40
    """Rounds of PPO under each principle."""
    prompts: int = 192
    """Prompts in an iteration."""
    learning_rate: float = 5e-4
    """Of PPO at the start; falls linearly to a tenth."""
    kl_coef: float = 0.08
    """Weight of the KL penalty at the start."""
    kl_target: float = 8.0
    """Nats a response that the weight is adapted to."""

    @property
    def text_tokens(self) -> int:
        """Of a prompt with its response, and of the texts that the judge learns from."""
        return self.prompt_tokens + self.response_tokens


MAY_CHANGE = ("data", "out", "resume")
MINIBATCHES = 3


def main(args: Args) -> dict[str, Any]:
    """Tells the whole story and returns what `summary.json` holds."""
    if args.pairs % args.judged or args.prompts % MINIBATCHES:
        raise ValueError(
            f"--judged {args.judged} must divide --pairs {args.pairs}, and {MINIBATCHES} must "
            f"divide --prompts {args.prompts}"
        )
    texts = read_labelled(args.data) if args.data else generated_corpus(args.texts, args.seed)
    mesh = sharding.mesh()
    options: dict[str, Any] = {"may_change": MAY_CHANGE, "resume": args.resume}
    with (
        jax.set_mesh(mesh),
        Run(
            args.out, dataclasses.asdict(args), mesh=mesh, fingerprint=fingerprint(texts), **options
        ) as run,
    ):
        return story(args, texts, run)


def story(args: Args, texts: list[LabelledText], run: Run) -> dict[str, Any]:
    """From labelled texts and a constitution to two policies."""
    clock = Clock()
    keys = [sharding.put(key, run.mesh) for key in jax.random.split(jax.random.key(args.seed), 8)]
    splits = split(texts)
    test = splits["test"]
    everything = [text.text for text in splits["train_a"] + splits["train_b"]]
    codec = Codec(everything, args)
    text = "".join(PRINCIPLE.format(name=name) for name in WANTS_POSITIVE)
    (args.out / "principles.yaml").write_text(text, encoding="utf-8")
    its = Machine(args, codec, principles.read(args.out / "principles.yaml"), run)
    gold = bag_of_words(splits["train_b"])
    prompts = {name: codec.prompts(splits[name]) for name in ("validation", "test")}
    asked = draw(prompts["validation"], args.pairs, iteration=0, seed=args.seed)

    # 1. The policy learns to write, and a copy of it from half of the texts to judge and to revise.
    with clock("sft"):
        policy = train_sft(its, codec.encode(everything), keys[0])
    with clock("judge"):
        judge = train_judge(its, splits["train_a"], policy)
        figures = examine(its, judge, test)
    head = jax.jit(lambda key: its.scorer.init(key)["head"])(keys[1])
    samples = its.respond(policy, asked, key=keys[2])
    before = its.respond(policy, prompts["test"], key=keys[3])
    verdicts_before = gold.predict(codec.texts(before))
    as_rows = jax.jit(partial(stages.revised, end_token=END))
    as_pairs = jax.jit(stages.soft_pairs)
    histories, recompilations = {}, 0
    for k, name in enumerate(WANTS_POSITIVE):
        # 2. It criticises and revises samples of the policy, which learns from the revisions.
        with clock(f"revision_{name}"):
            revised = revise(its, judge, samples, k, keys[4])
            rows = as_rows(prompts_of(revised), revised)
            start = train_on(its, f"revision_{name}", its.revising, policy, jax.device_get(rows))
        middle = its.respond(start, prompts["test"], key=keys[3])

        # 3. It judges pairs of what the policy now says: a reward model learns from that, and PPO.
        with clock(f"reward_{name}"):
            first, second = (its.respond(start, asked, key=key) for key in keys[5:7])
            probs = label(its, judge, first, second, k)
            reward = its.normalised({"backbone": judge, "head": head}, first)
            pairs = jax.device_get(as_pairs(first, second, probs))
            reward = train_on(its, f"reward_{name}", its.scoring, reward, (pairs,))
            reward = its.normalised(reward, first)
        with clock(f"ppo_{name}"):
            trained = train_policy(
                its, f"ppo_{name}", start, policy, reward, prompts["validation"], gold, keys[7]
            )
        histories[name] = trained.rows
        recompilations += trained.recompilations
        after = its.respond(trained.state.params["policy"], prompts["test"], key=keys[3])
        verdicts = gold.predict(codec.texts(after))
        write_samples(
            args.out / f"samples_{name}.md",
            codec.decode(before.prompts[:SHOWN]),
            codec.decode(before.responses[:SHOWN]),
            codec.decode(after.responses[:SHOWN]),
            scores_before=its.score(reward, before)[:SHOWN],
            scores_after=its.score(reward, after)[:SHOWN],
            gold_before=verdicts_before[:SHOWN],
            gold_after=verdicts[:SHOWN],
        )
        likes = [gold.predict(codec.texts(side)) for side in (first, second)]
        differ = likes[0] != likes[1]
        agrees = (probs > 0.5) == (likes[0] == WANTS_POSITIVE[name])
        figures |= {
            f"{name}/revisions_gold_positive_rate": np.mean(gold.predict(codec.texts(revised))),
            f"{name}/gold_positive_rate_after_revision": np.mean(gold.predict(codec.texts(middle))),
            f"{name}/kl_after_revision": its.divergence(policy, middle).mean(),
            f"{name}/labels_agree_with_gold": np.mean(agrees[differ]) if differ.any() else 0.5,
            f"{name}/gold_positive_rate": np.mean(verdicts),
            f"{name}/kl": its.divergence(policy, after).mean(),
            f"{name}/distinct_fraction": len(set(codec.texts(after))) / len(after.tokens),
        }
    picture(histories, args.out / "curves.png")
    summary = {
        "gold/test_accuracy": gold.score([t.text for t in test], [t.label for t in test]),
        "gold/positive_rate_before": np.mean(verdicts_before),
        **figures,
        "compilations_after_first_iteration": recompilations,
        **{f"seconds/{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds/compile": run.compilations.seconds,
        "seconds/total": clock.total(),
    }
    summary = {name: float(number) for name, number in summary.items()}
    run.write("summary.json", summary)
    return summary


def split(texts: Sequence[LabelledText]) -> dict[str, list[LabelledText]]:
    """Parts that depend on nothing but each text."""
    parts = split_by_hash(texts, SPLITS)
    for name, members in parts.items():
        if len({text.label for text in members}) < 2:
            raise DataError(f"{len(texts)} texts are too few: part {name!r} lacks a label")
    return parts


def bag_of_words(texts: Sequence[LabelledText]) -> Pipeline:
    """Logistic regression on the words of a text: True where it is positive."""
    words = CountVectorizer(binary=True, token_pattern=r"\S+")
    classifier = make_pipeline(words, LogisticRegression(max_iter=1000))
    return classifier.fit(*zip(*texts, strict=True))


class Codec:
    """Text to tokens and back, by a byte-level BPE tokenizer that has seen the answers."""

    def __init__(self, texts: Sequence[str], args: Args) -> None:
        self.args, self.tokenizer = args, Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab,
            special_tokens=["<pad>", "<begin>", "<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        answers = " first second yes no"
        self.tokenizer.train_from_iterator([*texts, *[answers] * (len(texts) // 20)], trainer)
        size = self.tokenizer.get_vocab_size()
        self.vocabulary = Vocabulary(
            lambda text: self.tokenizer.encode(text).ids, size, begin=(BEGIN,)
        )

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Whole texts between BEGIN and END, for the policy to learn."""
        return [[BEGIN, *ids, END][: self.args.text_tokens] for ids in self.plain(texts)]

    def judged(self, texts: Sequence[str]) -> Padded:
        """Texts before END, as long as samples are."""
        length = self.args.text_tokens
        ids = [[*ids, END][:length] for ids in self.plain(texts)]
        return right_pad(ids, num_rows=len(ids), length=length, pad_token=PAD)

    def answers(self, pairs: Sequence[tuple[str, str]]) -> Padded:
        """[K, 2, A], the answers that the K principles have, each before END."""
        ids = [[*ids, END] for pair in pairs for ids in self.plain(pair)]
        flat = right_pad(ids, num_rows=len(ids), length=max(map(len, ids)), pad_token=PAD)
        return Padded(*(x.reshape(len(pairs), 2, -1) for x in flat))

    def prompts(self, texts: Sequence[LabelledText]) -> Padded:
        """The first words of each text after BEGIN, left-padded."""
        words = [" ".join(text.text.split()[: self.args.prompt_words]) for text in texts]
        length = self.args.prompt_tokens
        ids = [[BEGIN, *ids][:length] for ids in self.plain(words)]
        return left_pad(ids, length=length, pad_token=PAD)

    def decode(self, tokens: np.ndarray) -> list[str]:
        return self.tokenizer.decode_batch(np.asarray(tokens).tolist())

    def texts(self, samples: Rollout) -> list[str]:
        return [text.strip() for text in self.decode(samples.tokens)]


def in_parts(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a method of rows: so many at a time, the last part filled up; the host has them."""
    program = jax.jit(lambda *args: sharding.whole(method(*args)), static_argnums=0)

    @wraps(method)
    def call(its: Machine, params: Params, *inputs: Any, key: Array | None = None) -> Any:
        size, num_rows = its.args.judged, len(jax.tree.leaves(inputs)[0])
        places = np.arange(-(-num_rows // size) * size) % num_rows
        parts = []
        for number, rows in enumerate(places.reshape(-1, size)):
            part = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
            keys = () if key is None else (jax.random.fold_in(key, number),)
            parts.append(
                jax.device_get(program(its, params, *sharding.rows(part, its.run.mesh), *keys))
            )
        return jax.tree.map(lambda *xs: np.concatenate(xs)[:num_rows], *parts)

    return call


class Learner(NamedTuple):
    """What makes a step of training on rows, of which each is passed so many times."""

    num_epochs: int
    optimizer: optax.GradientTransformation
    update: Callable[..., tuple[TrainState, Any]]


class Machine:
    """The models, what they are asked, and programs that are compiled once for all principles."""

    def __init__(
        self, args: Args, codec: Codec, constitution: Sequence[Principle], run: Run
    ) -> None:
        self.args, self.codec, self.run = args, codec, run
        self.names = [each.name for each in constitution]
        words = codec.vocabulary
        self.comparisons = [principles.comparison(each, words) for each in constitution]
        self.questions = [principles.question(each, words) for each in constitution]
        self.requests = {
            "comparison": [each.template for each in self.comparisons],
            "critique": [principles.critique_request(each, words) for each in constitution],
            "revision": [principles.revision_request(each, words) for each in constitution],
        }
        self.answers = {
            "comparison": codec.answers([each.answers["comparison"] for each in constitution]),
            "critique": codec.answers([each.answers["question"] for each in constitution]),
        }
        # As if every blank of a request were a whole text, and another followed.
        longest = max(
            sum(piece.size for piece in each.pieces) + (len(each.names) + 1) * args.text_tokens
            for kind in self.requests.values()
            for each in kind
        )
        config = zoo.DecoderConfig(
            vocab_size=words.size,
            context_length=longest,
            width=args.width,
            num_layers=args.layers,
            num_heads=args.heads,
            rotary_base=10_000.0,
        )
        self.model = zoo.decoder(config)
        head = zoo.linear_head(args.width, stddev=(args.width + 1) ** -0.5)
        self.scorer = zoo.scalar_model(self.model, head)
        self.ends: dict[str, int] = {
            "num_tokens": args.response_tokens, "pad_token": PAD, "end_token": END
        }  # fmt: skip
        updates = args.pairs // args.batch
        optimizer = adamw(args.revision_learning_rate, args.revision_epochs * updates)
        update = sft.make_step(self.model, optimizer)
        self.revising = Learner(args.revision_epochs, optimizer, update)
        optimizer = adamw(args.reward_learning_rate, args.reward_epochs * updates)
        update = reward_model.make_step(self.scorer, optimizer)
        self.scoring = Learner(args.reward_epochs, optimizer, update)
        self._prepare_ppo()

    def _prepare_ppo(self) -> None:
        args = self.args
        config = ppo.Config(**self.ends, num_epochs=2, num_minibatches=MINIBATCHES)
        num_updates = args.iterations * config.num_epochs * config.num_minibatches
        schedule = optax.linear_schedule(args.learning_rate, 0.1 * args.learning_rate, num_updates)
        adam = optax.adam(schedule, eps=1e-5)
        self.optimizer = optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        reward_of = reward_model.as_reward(self.scorer, self.model)
        hyper = ppo.Hyperparameters(gae_lambda=1.0, kl_target=args.kl_target, kl_horizon=2000.0)
        bound: dict[str, Any] = {
            "model": zoo.separate_trunks(self.model, self.scorer), "config": config
        }  # fmt: skip

        def iterate(state: ppo.State, prompts: Padded, ref: Params, reward: Params) -> Any:
            samples = ppo.sample(state, *prompts, hyper, **bound)
            scores = reward_of(reward, samples)
            state, metrics = ppo.learn(
                state, samples, scores, ref, hyper, optimizer=optimizer, **bound
            )
            return state, metrics, sharding.whole(samples)

        self.iterate = sharding.Step(iterate)

    @in_parts
    def respond(self, policy: Params, prompts: Padded, key: Array) -> Rollout:
        """One response to each prompt."""
        return rollout.generate(self.model, policy, *prompts, key, **self.ends)

    @in_parts
    def revise(self, judge: Params, samples: Rollout, index: Array, key: Array) -> Any:
        """What the judge says of each sample, whether that is no reproach, and its revision."""
        fields = templates.fields_of(samples, drop=SPECIAL)
        fields["response"] = plain((samples.tokens, samples.attention_mask))
        requests = (templates.select(self.requests[k], index) for k in ("critique", "revision"))
        critiques, new = stages.revise(self.model, judge, *requests, fields, key, **self.ends)
        yes, real = (jnp.asarray(x)[index, 0] for x in self.answers["critique"])
        content = ((critiques.responses[:, : yes.shape[1]] == yes) | ~real).all(axis=1)
        tokens, mask = (
            jnp.concatenate(x, axis=1)
            for x in zip(prompts_of(samples), (new.responses, new.response_mask), strict=True)
        )
        return critiques.responses, content, Rollout(tokens, mask, new.response_mask, new.log_probs)

    @in_parts
    def compare(self, judge: Params, first: Field, second: Field, index: Array) -> Any:
        """Log-odds of what stands first, in both orders, and the probability of the first."""
        asked = templates.select_question(self.comparisons, index)
        odds = judgement.compare(self.model, judge, asked, plain(first), plain(second))
        return *odds, judgement.mean_of_log_odds(*odds)

    @in_parts
    def rate(self, judge: Params, text: Field, index: Array) -> Array:
        """Log-odds of yes."""
        asked = templates.select_question(self.questions, index)
        return judgement.ask(self.model, judge, asked, {"response": plain(text)})

    @in_parts
    def score(self, reward: Params, samples: Rollout) -> Array:
        """What the reward model says."""
        return reward_model.as_reward(self.scorer, self.model)(reward, samples)

    @in_parts
    def divergence(self, ref_params: Params, samples: Rollout) -> Array:
        """log π(response) - log π_ref(response) of each sample; its mean is the KL."""
        mask = samples.response_mask
        reference, _ = response_log_probs(
            self.model, ref_params, samples.tokens, samples.attention_mask, mask.shape[1]
        )
        return masked.sum(kl.k1(samples.log_probs, reference), mask, axis=1)

    def normalised(self, reward: Params, samples: Rollout) -> Params:
        """The reward model whose scores have mean 0 and variance 1 where these had others."""
        scores = self.score(reward, samples)
        return reward | {"head": zoo.rescale(reward["head"], mean=scores.mean(), std=scores.std())}


def plain(text: Field) -> Field:
    """A text without what begins and ends it, to stand within another."""
    return templates.without(text, SPECIAL)


def prompts_of(samples: Rollout) -> Field:
    """With BEGIN."""
    return samples.prompts, samples.attention_mask[:, : samples.prompts.shape[1]]


def adamw(peak: float, num_updates: int) -> optax.GradientTransformation:
    """AdamW with a short warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(100, num_updates // 10), max(num_updates, 2)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))


def train_sft(its: Machine, texts: list[list[int]], key: Array) -> Params:
    """Maximum likelihood of the texts."""
    args = its.args
    lengths = bucket_lengths([len(text) for text in texts], num_buckets=3)

    def epoch(number: int, start: int) -> Iterator[Padded]:
        return bucket_batches(
            texts, batch_size=args.batch, lengths=lengths, pad_token=PAD, seed=args.seed,
            epoch=number, start=start,
        )  # fmt: skip

    num_updates = args.sft_epochs * sum(1 for _ in epoch(0, 0))
    optimizer = adamw(args.sft_learning_rate, num_updates)
    update = sft.make_step(its.model, optimizer)

    def step(state: TrainState, batch: Padded) -> tuple[TrainState, Any]:
        tokens, mask = sharding.rows(batch, its.run.mesh)
        return update(state, tokens, mask, mask)

    return its.run.train(
        "sft", lambda key: sft.init(its.model.init(key), optimizer), key, step=step,
        batches=partial(batches_from, epoch=epoch), num_steps=num_updates, save_every=200,
        show={"loss": "loss"},
    ).state.params  # fmt: skip


class Lesson(NamedTuple):
    """Requests of one kind, and what the judge is to say."""

    principle: np.ndarray  # [B] int32
    fields: dict[str, Padded]
    said: Padded


def choose(where: np.ndarray, one: Padded, other: Padded) -> Padded:
    """Row by row one or the other."""
    return Padded(*(np.where(where[:, None], a, b) for a, b in zip(one, other, strict=True)))


def lessons(
    its: Machine, positive: Padded, negative: Padded, num_principles: int, rng: np.random.Generator
) -> dict[str, Lesson]:
    """To compare each pair, to criticise each text, and to write a text in the place of another.

    The latter is asked twice, under a principle and under its opposite.
    """
    size, wants = len(positive.tokens), np.array([*WANTS_POSITIVE.values()])
    index = rng.integers(num_principles, size=(3, size), dtype=np.int32)
    revised = rng.integers(len(wants), size=size // 2, dtype=np.int32)
    swap = rng.random(size) < 0.5

    def answer(kind: str, index: np.ndarray, first: np.ndarray) -> Padded:
        return Padded(*(x[index, np.where(first, 0, 1)] for x in its.answers[kind]))

    def stacked(one: Padded, other: Padded) -> Padded:
        return Padded(*(np.concatenate(sides) for sides in zip(one, other, strict=True)))

    def twice(text: Padded) -> Padded:
        return stacked(text, text)

    rated, is_positive = index[1:].reshape(-1), np.arange(2 * size) < size
    wanted = wants[revised]
    liked, other = (Padded(*(x[: size // 2] for x in side)) for side in (positive, negative))
    return {
        "comparison": Lesson(
            index[0],
            {"first": choose(swap, negative, positive), "second": choose(swap, positive, negative)},
            answer("comparison", index[0], swap != wants[index[0]]),
        ),
        "critique": Lesson(
            rated,
            {"response": stacked(positive, negative)},
            answer("critique", rated, is_positive == wants[rated]),
        ),
        "revision": Lesson(
            np.concatenate([revised, (revised + 1) % len(wants)]),
            {
                "response": twice(choose(wanted, other, liked)),
                "critique": twice(answer("critique", revised, np.zeros(len(revised), bool))),
                "prompt": twice(Padded(*(x[:, :0] for x in liked))),
            },
            twice(choose(wanted, liked, other)),
        ),
    }


def train_judge(its: Machine, texts: list[LabelledText], policy: Params) -> Params:
    """Maximum likelihood of the right answers, and of texts that keep to a principle.

    A text is also to be more probable after the request that it keeps to than after the opposite
    one: of likelihood alone a small model learns to write, and hardly to heed what is asked. The
    first principle comes first, alone: the answers to opposite questions cancel for as long as
    neither is understood.
    """
    args = its.args
    weights = {
        "comparison": 1.0,
        "critique": 1.0,
        "revision": args.text_weight,
        "contrast": args.contrast_weight,
    }

    def epoch(number: int, start: int) -> Iterator[dict[str, Lesson]]:
        sides = zip(*pair_by_label(texts, seed=args.seed + number), strict=True)
        positive, negative = (its.codec.judged(side) for side in sides)
        known = 1 if number < args.judge_alone else len(WANTS_POSITIVE)
        for at in range(start * args.batch, len(positive.tokens) - args.batch + 1, args.batch):
            pairs = (Padded(*(x[at : at + args.batch] for x in y)) for y in (positive, negative))
            yield lessons(its, *pairs, known, np.random.default_rng([args.seed, number, at]))

    def log_prob(params: Params, kind: str, lesson: Lesson) -> Array:
        request = templates.select(its.requests[kind], lesson.principle)
        fields = {name: plain(field) for name, field in lesson.fields.items()}
        filled = templates.fill(request, fields)
        whole = tuple(jnp.concatenate(x, axis=1) for x in zip(filled, lesson.said, strict=True))
        mask = lesson.said.mask
        log_probs, _ = response_log_probs(
            its.model, params, *sharding.split_rows(whole), mask.shape[1]
        )
        return masked.sum(log_probs, mask, axis=1)

    def loss(params: Params, batch: dict[str, Lesson]) -> tuple[Array, dict[str, Array]]:
        found = {kind: log_prob(params, kind, lesson) for kind, lesson in batch.items()}
        found["revision"], opposite = jnp.split(found["revision"], 2)
        losses = {kind: -value.mean() for kind, value in found.items()}
        losses["contrast"] = -jax.nn.log_sigmoid(found["revision"] - opposite).mean()
        total = sum(weights[kind] * losses[kind] for kind in weights)
        return total, {f"loss/{kind}": value for kind, value in losses.items()}

    num_updates = args.judge_epochs * sum(1 for _ in epoch(0, 0))
    optimizer = adamw(args.judge_learning_rate, num_updates)

    @sharding.Step
    def update(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch)
        state, counted = apply_gradients(state, grads, optimizer)
        return state, metrics | counted

    return its.run.train(
        "judge", lambda policy: sft.init(policy, optimizer), policy,
        step=lambda state, batch: update(state, sharding.rows(batch, its.run.mesh)),
        batches=partial(batches_from, epoch=epoch), num_steps=num_updates, save_every=200,
        show={kind: f"loss/{kind}" for kind in weights},
    ).state.params  # fmt: skip


def examine(its: Machine, judge: Params, texts: list[LabelledText]) -> dict[str, Any]:
    """What the judge says of held-out pairs, each in a random order, against their labels.

    The bias after averaging is that of the averaged judgement of a pair and of the same pair given
    the other way round, both of them asked for.
    """
    pairs = pair_by_label(texts, seed=its.args.seed)
    swap = np.random.default_rng(its.args.seed).random(len(pairs)) < 0.5
    index = np.arange(len(pairs), dtype=np.int32) % len(WANTS_POSITIVE)
    wants = np.array([*WANTS_POSITIVE.values()])[index]
    positive, negative = (its.codec.judged(side) for side in zip(*pairs, strict=True))
    sides = choose(swap, negative, positive), choose(swap, positive, negative)
    given, swapped, probs = its.compare(judge, *sides, index)
    *_, back = its.compare(judge, *sides[::-1], index)
    bias = jax.jit(judgement.position_bias)
    before = bias(jax.nn.sigmoid(given), jax.nn.sigmoid(swapped))
    right = (probs > 0.5) == (wants != swap)
    yes, no = (its.rate(judge, side, index) > 0 for side in (positive, negative))
    return {
        "judge/agreement": right.mean(),
        "judge/agreement_one_order": np.mean((given > 0) == (wants != swap)),
        **{f"judge/{name}_before": x for name, x in before.items()},
        **{f"judge/{name}_after": x for name, x in bias(probs, back).items()},
        **{f"judge/agreement_{name}": right[index == k].mean() for k, name in enumerate(its.names)},
        "judge/agreement_question": 0.5 * (np.mean(yes == wants) + np.mean(no != wants)),
    }


def revise(its: Machine, judge: Params, samples: Rollout, principle: int, key: Array) -> Rollout:
    """Revises samples until the judge is content with them, and writes down how."""
    name, samples = its.names[principle], jax.tree.map(np.array, samples)
    left, records = np.arange(len(samples.tokens)), []
    for number in range(its.args.rounds):
        if not left.size:
            break
        old = jax.tree.map(lambda x, left=left: x[left], samples)
        index = np.full(len(left), principle, np.int32)
        of_round = jax.random.fold_in(key, number)
        critiques, content, new = its.revise(judge, old, index, key=of_round)
        said = (old.prompts, old.responses, critiques, new.responses)
        left = left[~content]
        told: dict[str, Any] = dict(principles=[name] * len(left), judge=JUDGE)
        texts = [its.codec.decode(tokens[~content]) for tokens in said]
        records += stages.revision_records(*texts, **told)
        for whole, revised in zip(*map(jax.tree.leaves, (samples, new)), strict=True):
            whole[left] = revised[~content]
    stages.write_records(its.args.out / f"revisions_{name}.jsonl", records)
    return samples


def label(
    its: Machine, judge: Params, first: Rollout, second: Rollout, principle: int
) -> np.ndarray:
    """The probability that the first of two is better, written down for a person to audit."""
    name, index = its.names[principle], np.full(len(first.tokens), principle, np.int32)
    sides = ((side.tokens, side.attention_mask) for side in (first, second))
    *_, probs = its.compare(judge, *sides, index)
    texts = map(its.codec.decode, (first.prompts, first.responses, second.responses))
    told: dict[str, Any] = dict(principles=[name] * len(probs), judge=JUDGE)
    records = stages.comparison_records(*texts, probs, **told)
    stages.write_records(its.args.out / f"labels_{name}.jsonl", records)
    return probs


def train_on(its: Machine, stage: str, learner: Learner, params: Params, data: Any) -> Params:
    """Trains on rows, `--batch` of them at a time."""
    size, total = its.args.batch, its.args.pairs

    def epoch(number: int, start: int) -> Iterator[Any]:
        order = np.random.default_rng([its.args.seed, number]).permutation(total)
        for at in range(start * size, total - size + 1, size):
            yield jax.tree.map(lambda x, at=at: x[order[at : at + size]], data)

    return its.run.train(
        stage, lambda params: sft.init(params, learner.optimizer), params,
        step=lambda state, batch: learner.update(state, *sharding.rows(batch, its.run.mesh)),
        batches=partial(batches_from, epoch=epoch), save_every=200,
        num_steps=learner.num_epochs * (total // size), show={"loss": "loss"},
    ).state.params  # fmt: skip


def train_policy(
    its: Machine,
    stage: str,
    policy: Params,
    ref_params: Params,
    reward: Params,
    prompts: Padded,
    gold: Pipeline,
    key: Array,
) -> Trained:
    """Moves the policy towards what the reward model likes; gold watches."""
    args = its.args

    def step(state: ppo.State, batch: Padded) -> tuple[ppo.State, dict[str, Any]]:
        batch = sharding.rows(batch, its.run.mesh)
        state, metrics, samples = its.iterate(state, batch, ref_params, reward)
        verdicts = gold.predict(its.codec.texts(samples))
        return state, metrics | {"gold/positive_rate": np.mean(verdicts)}

    def epoch(_: int, start: int) -> Iterator[Padded]:
        for iteration in range(start, args.iterations):
            yield draw(prompts, args.prompts, iteration=iteration, seed=args.seed)

    def start(policy: Params, reward: Params, key: Array) -> ppo.State:
        params = {"policy": policy, "value": reward}
        return ppo.init(params, its.optimizer, key, kl_coef=args.kl_coef)

    return its.run.train(
        stage, start, policy, reward, key, step=step,
        batches=partial(batches_from, epoch=epoch), num_steps=args.iterations, save_every=10,
        show={"score": "objective/scores", "gold": "gold/positive_rate", "kl": "objective/kl"},
        first=0,
    )  # fmt: skip


def picture(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The share that gold finds positive, and the KL, by iteration under each principle."""
    panels = {
        "gold/positive_rate": ("Positive to the gold classifier", "share of samples", 0.5),
        "objective/kl": ("Distance from the SFT policy", "KL (nats)", None),
    }
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True)
        for axis, (metric, (title, unit, level)) in zip(axes, panels.items(), strict=True):
            for colour, (name, rows) in zip(
                (plots.BLUE, plots.ORANGE), histories.items(), strict=True
            ):
                steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
                axis.plot(steps, values, color=colour, label=name)
                axis.plot(steps[-1], values[-1], "o", color=colour, markersize=4)
            if level is not None:
                axis.axhline(level, color=plots.FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
                axis.set_ylim(-0.03, 1.03)
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axis.set_ylabel(unit)
        axes[-1].legend(title="principle", frameon=False, fontsize=8, loc="lower right")
        axes[-1].set_ylim(bottom=0)
        axes[-1].set_xlabel("PPO iteration")
        figure.align_ylabels(axes)
        figure.savefig(path, dpi=220)


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Args)), indent=2))
