"""A policy that learns from principles: a judge applies them, and no label reaches the policy.

A small language model learns on one half of labelled sentences to answer what the principles of a
constitution ask. It then judges pairs of samples of the policy, a reward model learns from its
probabilities, and PPO moves the policy, once under a principle and once under its opposite. A
classifier of another kind, trained on the other half, says whether the policy followed.

    python experiments/constitution.py --data FOLDER --out runs/constitution

FOLDER holds `*.pos` and `*.neg`, one text a line; without it, text is generated. The run leaves
`principles.yaml`, the judge's labels as records (`labels_<principle>.jsonl`), tables of samples
(`samples_<principle>.md`), `curves.png` and `summary.json`. A run that was broken off goes on with
`--resume`. After Bai et al. 2022, Constitutional AI: Harmlessness from AI Feedback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from rlhfjax.data.batches import Padded, bucket_batches, bucket_lengths, left_pad, right_pad
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.generated import generated_corpus
from rlhfjax.data.preferences import pair_by_label
from rlhfjax.data.text import DataError, LabelledText, read_labelled, split_by_hash
from rlhfjax.feedback import judgement, principles, stages, templates
from rlhfjax.feedback.principles import Principle
from rlhfjax.feedback.templates import Field, Question, Vocabulary
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout, ScalarModel

PAD, BEGIN, END = 0, 1, 2
SPECIAL = (PAD, BEGIN, END)
JUDGE, SHOWN = "judge", 32
SPLITS = {"train_a": 0.4, "train_b": 0.4, "validation": 0.1, "test": 0.1}
# The word that tells a principle from its opposite stands last: a small model finds it there.
CONSTITUTION = """\
- name: warm
  comparison: "first : {first} second : {second} which one is more warm"
  question: "{response} is this warm"
  answers:
    comparison: [" first", " second"]
    question: [" yes", " no"]
- name: cold
  comparison: "first : {first} second : {second} which one is more cold"
  question: "{response} is this cold"
  answers:
    comparison: [" first", " second"]
    question: [" yes", " no"]
"""
WANTS_POSITIVE = (True, False)  # of the principles in their order


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
    judge_epochs: int = 7
    """Passes of the judge over its half of the texts."""
    judge_alone: int = 1
    """Passes of these under the first principle alone."""
    judge_learning_rate: float = 1e-3
    """Peak of a cosine schedule."""
    pairs: int = 2048
    """Pairs of samples that are judged under each principle; a multiple of --judged."""
    judged: int = 256
    """Pairs that are sampled and judged at a time."""
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
    fingerprint = hashlib.sha256(repr([tuple(text) for text in texts]).encode()).hexdigest()
    mesh = sharding.mesh()
    options: dict[str, Any] = {"may_change": MAY_CHANGE, "resume": args.resume}
    with (
        jax.set_mesh(mesh),
        Run(
            args.out, dataclasses.asdict(args), mesh=mesh, fingerprint=fingerprint, **options
        ) as run,
    ):
        return story(args, texts, run)


def story(args: Args, texts: list[LabelledText], run: Run) -> dict[str, Any]:
    """From labelled texts and a constitution to two policies."""
    clock = Clock()
    keys = [sharding.put(key, run.mesh) for key in jax.random.split(jax.random.key(args.seed), 6)]
    splits = split(texts)
    everything = [text.text for text in splits["train_a"] + splits["train_b"]]
    codec = Codec(everything, args)
    (args.out / "principles.yaml").write_text(CONSTITUTION, encoding="utf-8")
    constitution = principles.read(args.out / "principles.yaml")
    questions = Questions(
        [principles.comparison(each, codec.vocabulary) for each in constitution],
        [principles.question(each, codec.vocabulary) for each in constitution],
    )
    gold = bag_of_words(splits["train_b"])
    model, scorer = build_models(args, codec, questions)
    prompts = {name: codec.prompts(splits[name]) for name in ("validation", "test")}
    respond = Sampler(args, model, run)

    # 1. The policy learns to write, and a copy of it to answer questions about half of the texts.
    with clock("sft"):
        policy = train_sft(args, model, codec.encode(everything), keys[0], run)
    with clock("judge"):
        judge = train_judge(args, model, questions, codec, splits["train_a"], policy, run)
        compared = jax.jit(partial(compare, model, questions))
        rated = jax.jit(partial(rate, model, questions))
        test = splits["test"]
        figures = examine(args, compared, rated, judge, constitution, codec, test, run)

    # 2. Pairs of its samples, judged under each principle.
    with clock("labels"):
        asked = draw(prompts["validation"], args.pairs, 0, args.seed)
        pairs = Pairs(*(respond(policy, asked, key) for key in jax.random.split(keys[1])))
        labels = [
            judge_pairs(args, compared, judge, pairs, k, run) for k in range(len(constitution))
        ]

    # 3. Under each principle a reward model from the judge's probabilities, and PPO.
    update_reward = RewardStep(args, scorer)
    iterate = PPOStep(args, model, scorer)
    score, divergence_of = (
        partial(in_parts, jax.jit(function), size=args.judged, run=run)
        for function in (iterate.reward_of, partial(divergence, model=model))
    )
    head = jax.jit(lambda key: scorer.init(key)["head"])(keys[4])
    before = respond(policy, prompts["test"], keys[3])
    verdicts_before = gold.predict(codec.texts(before))
    histories, recompilations = {}, 0
    for principle, probs, wanted in zip(constitution, labels, WANTS_POSITIVE, strict=True):
        name = principle.name
        told = dict(principles=[name] * len(probs), judge=JUDGE)
        write_labels(args.out / f"labels_{name}.jsonl", codec, pairs, probs, **told)
        with clock(f"reward_{name}"):
            start = {"backbone": judge, "head": head}
            start = normalised(start, score(start, (pairs.first,)))
            reward = train_reward(args, update_reward, name, start, pairs, probs, run)
            reward = normalised(reward, score(reward, (pairs.first,)))
        with clock(f"ppo_{name}"):
            trained = train_policy(
                args,
                iterate,
                name,
                policy,
                reward,
                prompts["validation"],
                codec,
                gold,
                keys[5],
                run,
            )
        histories[name] = trained.rows
        recompilations += trained.recompilations
        after = respond(trained.state.params["policy"], prompts["test"], keys[3])
        verdicts = gold.predict(codec.texts(after))
        write_samples(
            args.out / f"samples_{name}.md",
            codec.decode(before.prompts)[:SHOWN],
            codec.decode(before.responses)[:SHOWN],
            codec.decode(after.responses)[:SHOWN],
            scores_before=score(reward, (before,))[:SHOWN],
            scores_after=score(reward, (after,))[:SHOWN],
            gold_before=verdicts_before[:SHOWN],
            gold_after=verdicts[:SHOWN],
        )
        figures |= {
            f"{name}/gold_positive_rate": float(np.mean(verdicts)),
            f"{name}/kl": float(divergence_of(policy, (after,)).mean()),
            f"{name}/labels_agree_with_gold": agreement(
                gold, codec, pairs, probs, wants_positive=wanted
            ),
            f"{name}/distinct_fraction": len(set(codec.texts(after))) / len(after.tokens),
        }
    picture(histories, args.out / "curves.png")
    summary = {
        "gold/test_accuracy": gold.score([t.text for t in test], [t.label for t in test]),
        "gold/positive_rate_before": float(np.mean(verdicts_before)),
        **figures,
        "compilations_after_first_iteration": recompilations,
        **{f"seconds/{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds/compile": run.compilations.seconds,
        "seconds/total": clock.total(),
    }
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
        """Texts without BEGIN and END, as long as samples are."""
        length = self.args.text_tokens
        ids = [ids[:length] for ids in self.plain(texts)]
        return right_pad(ids, num_rows=len(ids), length=length, pad_token=PAD)

    def prompts(self, texts: Sequence[LabelledText]) -> Padded:
        """The first words of each text after BEGIN, left-padded."""
        words = [" ".join(text.text.split()[: self.args.prompt_words]) for text in texts]
        length = self.args.prompt_tokens
        ids = [[BEGIN, *ids][:length] for ids in self.plain(words)]
        return left_pad(ids, length=length, pad_token=PAD)

    def decode(self, tokens: Array) -> list[str]:
        return self.tokenizer.decode_batch(np.asarray(tokens).tolist())

    def texts(self, samples: Rollout) -> list[str]:
        return [text.strip() for text in self.decode(samples.tokens)]


class Questions(NamedTuple):
    """What the constitution asks, by principle."""

    comparisons: list[Question]
    questions: list[Question]


def build_models(
    args: Args, codec: Codec, questions: Questions
) -> tuple[LanguageModel, ScalarModel]:
    """The decoder, long enough for two texts and a question, and a scalar head on it."""
    longest = max(
        sum(piece.size for piece in asked.template.pieces)
        + len(asked.template.names) * args.text_tokens
        + asked.answers.shape[-1]
        for kind in questions
        for asked in kind
    )
    config = zoo.DecoderConfig(
        vocab_size=codec.vocabulary.size,
        context_length=longest,
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
    args: Args, model: LanguageModel, texts: list[list[int]], key: Array, run: Run
) -> Params:
    """Maximum likelihood of the texts."""
    lengths = bucket_lengths([len(text) for text in texts], num_buckets=3)

    def epoch(number: int, start: int) -> Iterator[Padded]:
        return bucket_batches(
            texts, batch_size=args.batch, lengths=lengths, pad_token=PAD, seed=args.seed,
            epoch=number, start=start,
        )  # fmt: skip

    num_updates = args.sft_epochs * sum(1 for _ in epoch(0, 0))
    optimizer = adamw(args.sft_learning_rate, num_updates)
    update = sft.make_step(model, optimizer)

    def step(state: TrainState, batch: Padded) -> tuple[TrainState, Any]:
        tokens, mask = sharding.rows(batch, run.mesh)
        return update(state, tokens, mask, mask)

    return run.train(
        "sft", lambda key: sft.init(model.init(key), optimizer), key, step=step,
        batches=partial(batches_from, epoch=epoch), num_steps=num_updates, save_every=200,
        show={"loss": "loss"},
    ).state.params  # fmt: skip


class Labelled(NamedTuple):
    """B positive texts, B negative ones, and what is asked of each pair and of each text."""

    positive: Padded
    negative: Padded
    positive_first: np.ndarray  # [B] bool
    principle: np.ndarray  # [B] int32
    principles: np.ndarray  # [2·B] int32, of the single texts


def train_judge(
    args: Args,
    model: LanguageModel,
    questions: Questions,
    codec: Codec,
    texts: list[LabelledText],
    policy: Params,
    run: Run,
) -> Params:
    """Maximum likelihood of the right answers, to comparisons and to questions.

    The first principle comes first, alone: the answers to opposite questions cancel for as long as
    neither is understood.
    """
    wants_positive = jnp.array(WANTS_POSITIVE)

    def epoch(number: int, start: int) -> Iterator[Labelled]:
        rng = np.random.default_rng([args.seed, number])
        sides = zip(*pair_by_label(texts, seed=args.seed + number), strict=True)
        positive, negative = (codec.judged(side) for side in sides)
        size, num_pairs = args.batch, len(positive.tokens)
        first = rng.random(num_pairs) < 0.5
        known = 1 if number < args.judge_alone else len(WANTS_POSITIVE)
        asked = rng.integers(known, size=(3, num_pairs), dtype=np.int32)
        for at in range(start * size, num_pairs - size + 1, size):
            rows = slice(at, at + size)
            yield Labelled(
                Padded(*(x[rows] for x in positive)), Padded(*(x[rows] for x in negative)),
                first[rows], asked[0, rows], asked[1:, rows].reshape(-1),
            )  # fmt: skip

    def loss(params: Params, batch: Labelled) -> tuple[Array, dict[str, Array]]:
        positive, negative = (batch.positive, batch.negative)
        swap = batch.positive_first[:, None]
        first = [jnp.where(swap, *both) for both in zip(positive, negative, strict=True)]
        second = [jnp.where(swap, *both) for both in zip(negative, positive, strict=True)]
        single = [jnp.concatenate(both) for both in zip(positive, negative, strict=True)]
        is_positive = jnp.arange(len(single[0])) < len(swap)
        first_wanted = batch.positive_first == wants_positive[batch.principle]
        yes_wanted = is_positive == wants_positive[batch.principles]

        def log_prob(kind: list[Question], index: Array, fields: Any, wanted: Array) -> Array:
            asked = templates.select_question(kind, index)
            tokens, mask = sharding.split_rows(templates.fill(asked.template, fields))
            log_probs = judgement.answer_log_probs(
                model, params, tokens, mask, asked.answers, asked.mask
            )
            return jnp.where(wanted, log_probs[:, 0], log_probs[:, 1]).mean()

        both = {"first": tuple(first), "second": tuple(second)}
        compared = -log_prob(questions.comparisons, batch.principle, both, first_wanted)
        one = {"response": tuple(single)}
        rated = -log_prob(questions.questions, batch.principles, one, yes_wanted)
        return compared + rated, {"loss/comparison": compared, "loss/question": rated}

    num_updates = args.judge_epochs * sum(1 for _ in epoch(0, 0))
    optimizer = adamw(args.judge_learning_rate, num_updates)

    @sharding.Step
    def update(state: TrainState, batch: Labelled) -> tuple[TrainState, dict[str, Array]]:
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch)
        state, counted = apply_gradients(state, grads, optimizer)
        return state, metrics | counted

    return run.train(
        "judge", lambda policy: sft.init(policy, optimizer), policy,
        step=lambda state, batch: update(state, sharding.rows(batch, run.mesh)),
        batches=partial(batches_from, epoch=epoch), num_steps=num_updates, save_every=200,
        show={"comparison": "loss/comparison", "question": "loss/question"},
    ).state.params  # fmt: skip


def compare(
    model: LanguageModel,
    questions: Questions,
    judge: Params,
    first: Field,
    second: Field,
    principle: Array,
) -> tuple[Array, Array]:
    """Log-odds of what stands first, in both orders, for every process to read."""
    asked = templates.select_question(questions.comparisons, principle)
    return sharding.whole(judgement.compare(model, judge, asked, first, second))


def rate(
    model: LanguageModel, questions: Questions, judge: Params, text: Field, principle: Array
) -> Array:
    """Log-odds of yes, for every process to read."""
    asked = templates.select_question(questions.questions, principle)
    return sharding.whole(judgement.ask(model, judge, asked, {"response": text}))


def examine(
    args: Args,
    compared: Callable[..., tuple[Array, Array]],
    rated: Callable[..., Array],
    judge: Params,
    constitution: Sequence[Principle],
    codec: Codec,
    texts: list[LabelledText],
    run: Run,
) -> dict[str, float]:
    """What the judge says of held-out pairs, each in a random order, against their labels.

    The bias after averaging is that of the averaged judgement of a pair and of the same pair given
    the other way round, both of them asked for.
    """
    pairs = pair_by_label(texts, seed=args.seed)
    rng = np.random.default_rng(args.seed)
    swap = rng.random(len(pairs)) < 0.5
    index = np.arange(len(pairs), dtype=np.int32) % len(WANTS_POSITIVE)
    wants = np.array(WANTS_POSITIVE)[index]
    positive, negative = (codec.judged(side) for side in zip(*pairs, strict=True))
    first, second = (
        Padded(*(np.where(chosen[:, None], a, b) for a, b in zip(positive, negative, strict=True)))
        for chosen in (~swap, swap)
    )
    given, swapped = in_parts(compared, judge, (first, second, index), args.judged, run)
    again, back = in_parts(compared, judge, (second, first, index), args.judged, run)
    probs = judgement.mean_of_log_odds(given, swapped)
    before = judgement.position_bias(jax.nn.sigmoid(given), jax.nn.sigmoid(swapped))
    after = judgement.position_bias(probs, judgement.mean_of_log_odds(again, back))
    first_better = wants == ~swap
    right = (np.asarray(probs) > 0.5) == first_better
    found = {
        "judge/agreement": float(right.mean()),
        "judge/agreement_one_order": float(np.mean((np.asarray(given) > 0) == first_better)),
        **{f"judge/{name}_before": float(x) for name, x in before.items()},
        **{f"judge/{name}_after": float(x) for name, x in after.items()},
    }
    for k, principle in enumerate(constitution):
        found[f"judge/agreement_{principle.name}"] = float(right[index == k].mean())
    yes = [in_parts(rated, judge, (side, index), args.judged, run) for side in (positive, negative)]
    kept = [(np.asarray(yes[0]) > 0) == wants, (np.asarray(yes[1]) > 0) != wants]
    return found | {"judge/agreement_question": float(np.mean(kept))}


def in_parts(function: Callable[..., Any], params: Params, inputs: Any, size: int, run: Run) -> Any:
    """`function(params, *inputs)` of so many rows at a time, the last part filled up."""
    num_rows = len(jax.tree.leaves(inputs)[0])
    places = np.arange(-(-num_rows // size) * size) % num_rows
    parts = []
    for rows in places.reshape(-1, size):
        part = jax.tree.map(lambda x, rows=rows: x[rows], inputs)
        parts.append(function(params, *sharding.rows(part, run.mesh)))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs)[:num_rows], *parts)


class Sampler:
    """One response to each prompt, so many at a time, on the host."""

    def __init__(self, args: Args, model: LanguageModel, run: Run) -> None:
        def sample(params: Params, prompts: Array, mask: Array, key: Array) -> Rollout:
            return sharding.whole(
                rollout.generate(
                    model, params, prompts, mask, key,
                    num_tokens=args.response_tokens, pad_token=PAD, end_token=END,
                )
            )  # fmt: skip

        self.size, self.run, self.sample = args.judged, run, jax.jit(sample)

    def __call__(self, params: Params, prompts: Padded, key: Array) -> Rollout:
        numbers = iter(range(len(prompts.tokens)))

        def of_part(params: Params, *part: Array) -> Rollout:
            return self.sample(params, *part, jax.random.fold_in(key, next(numbers)))

        return jax.device_get(in_parts(of_part, params, tuple(prompts), self.size, self.run))


class Pairs(NamedTuple):
    """Two responses to each of N prompts."""

    first: Rollout
    second: Rollout


def judge_pairs(
    args: Args, compared: Callable[..., Any], judge: Params, pairs: Pairs, principle: int, run: Run
) -> np.ndarray:
    """The probability that the first of each pair is better under the principle."""
    index = np.full(len(pairs.first.tokens), principle, np.int32)
    sides = [
        tuple(map(np.asarray, templates.without((side.tokens, side.attention_mask), SPECIAL)))
        for side in pairs
    ]
    given, swapped = in_parts(compared, judge, (*sides, index), args.judged, run)
    return np.asarray(judgement.mean_of_log_odds(given, swapped))


def write_labels(path: Path, codec: Codec, pairs: Pairs, probs: np.ndarray, **told: Any) -> None:
    """What the judge said, for a person to audit."""
    texts = (codec.decode(x) for x in (pairs.first.prompts, *(side.responses for side in pairs)))
    stages.write_records(path, stages.comparison_records(*texts, probs, **told))


def agreement(
    gold: Pipeline, codec: Codec, pairs: Pairs, probs: np.ndarray, *, wants_positive: bool
) -> float:
    """Where gold finds one of two as the principle wants it: how often the judge prefers it."""
    first, second = (gold.predict(codec.texts(side)) == wants_positive for side in pairs)
    differ = first != second
    return float(np.mean((probs > 0.5)[differ] == first[differ])) if differ.any() else 0.5


class RewardStep:
    """Training of a reward model on soft labels, compiled once for all principles."""

    def __init__(self, args: Args, scorer: ScalarModel) -> None:
        self.num_updates = args.reward_epochs * (args.pairs // args.batch)
        self.optimizer = adamw(args.reward_learning_rate, self.num_updates)
        self.update = reward_model.make_step(scorer, self.optimizer)


def train_reward(
    args: Args,
    compiled: RewardStep,
    name: str,
    params: Params,
    pairs: Pairs,
    probs: np.ndarray,
    run: Run,
) -> Params:
    """Bradley-Terry on the judge's probabilities."""
    batch_of = stages.soft_pairs(*pairs, jnp.asarray(probs))

    def epoch(number: int, start: int) -> Iterator[PreferenceBatch]:
        order = np.random.default_rng([args.seed, number]).permutation(len(probs))
        for at in range(start * args.batch, len(order) - args.batch + 1, args.batch):
            rows = order[at : at + args.batch]
            yield jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], batch_of)

    return run.train(
        f"reward_{name}",
        lambda params: reward_model.init(params, compiled.optimizer),
        params,
        step=lambda state, batch: compiled.update(state, sharding.rows(batch, run.mesh)),
        batches=partial(batches_from, epoch=epoch),
        num_steps=compiled.num_updates,
        save_every=200,
        show={"loss": "loss", "accuracy": "accuracy"},
    ).state.params


def normalised(params: Params, scores: Array) -> Params:
    """The reward model whose scores have mean 0 and variance 1 where these had others."""
    return params | {"head": zoo.rescale(params["head"], mean=scores.mean(), std=scores.std())}


def divergence(ref_params: Params, samples: Rollout, *, model: LanguageModel) -> Array:
    """log π(response) - log π_ref(response) of each sample; its mean is the KL."""
    mask = samples.response_mask
    reference, _ = response_log_probs(
        model, ref_params, samples.tokens, samples.attention_mask, mask.shape[1]
    )
    return sharding.whole(masked.sum(kl.k1(samples.log_probs, reference), mask, axis=1))


class PPOStep:
    """An iteration of PPO, compiled once for all principles; the samples come back to be read."""

    def __init__(self, args: Args, model: LanguageModel, scorer: ScalarModel) -> None:
        config = ppo.Config(
            num_tokens=args.response_tokens, pad_token=PAD, end_token=END, num_epochs=2,
            num_minibatches=MINIBATCHES,
        )  # fmt: skip
        num_updates = args.iterations * config.num_epochs * config.num_minibatches
        schedule = optax.linear_schedule(args.learning_rate, 0.1 * args.learning_rate, num_updates)
        adam = optax.adam(schedule, eps=1e-5)
        self.optimizer = optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        self.reward_of = reward_of = reward_model.as_reward(scorer, model)
        hyper = ppo.Hyperparameters(gae_lambda=1.0, kl_target=args.kl_target, kl_horizon=2000.0)
        bound: dict[str, Any] = {"model": zoo.separate_trunks(model, scorer), "config": config}

        def iterate(state: ppo.State, prompts: Padded, ref: Params, reward: Params) -> Any:
            samples = ppo.sample(state, *prompts, hyper, **bound)
            scores = reward_of(reward, samples)
            state, metrics = ppo.learn(
                state, samples, scores, ref, hyper, optimizer=optimizer, **bound
            )
            return state, metrics, sharding.whole(samples)

        self.iterate = sharding.Step(iterate)


def train_policy(
    args: Args,
    compiled: PPOStep,
    name: str,
    policy: Params,
    reward: Params,
    prompts: Padded,
    codec: Codec,
    gold: Pipeline,
    key: Array,
    run: Run,
) -> Trained:
    """Moves the policy towards what the reward model likes; gold watches."""

    def step(state: ppo.State, batch: Padded) -> tuple[ppo.State, dict[str, Any]]:
        batch = sharding.rows(batch, run.mesh)
        state, metrics, samples = compiled.iterate(state, batch, policy, reward)
        return state, metrics | {"gold/positive_rate": np.mean(gold.predict(codec.texts(samples)))}

    def epoch(_: int, start: int) -> Iterator[Padded]:
        for iteration in range(start, args.iterations):
            yield draw(prompts, args.prompts, iteration, args.seed)

    def start(policy: Params, reward: Params, key: Array) -> ppo.State:
        params = {"policy": policy, "value": reward}
        return ppo.init(params, compiled.optimizer, key, kl_coef=args.kl_coef)

    return run.train(
        f"ppo_{name}", start, policy, reward, key, step=step,
        batches=partial(batches_from, epoch=epoch), num_steps=args.iterations, save_every=10,
        show={"score": "objective/scores", "gold": "gold/positive_rate", "kl": "objective/kl"},
        first=0,
    )  # fmt: skip


def draw(prompts: Padded, number: int, iteration: int, seed: int) -> Padded:
    """The prompts of an iteration: all of them once, in random order, then again in another."""
    total = len(prompts.tokens)
    places = np.arange(iteration * number, (iteration + 1) * number)
    passes = {n: np.random.default_rng([seed, n]).permutation(total) for n in set(places // total)}
    rows = np.array([passes[place // total][place % total] for place in places])
    return Padded(prompts.tokens[rows], prompts.mask[rows])


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
