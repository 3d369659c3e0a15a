"""Sixteen people who like different texts, and a policy for each that learns from comparisons.

A small language model learns to write. Simulated people with hidden tastes, of which some
contradict others, compare its texts: 32 pairs each, from which a reward and a policy learn what
most like (stage "shared"). Then everybody begins with those and goes on alone: rounds of sampling
pairs from one's own policy, asking about the 32 that an ensemble finds most informative, fitting
one's own reward and training one's own policy on its lower bound (stage "people"). A user is a
vector that the reward head reads and a low-rank adapter of the policy; all users are one program.

    python experiments/personalization.py --out runs/personalization

The folder then has `summary.json`, `metrics.jsonl`, `samples.md` and `people.png`: what each gains
over the shared policy by their own taste, and how many comparisons chosen pairs take for the
accuracy of random ones. A run that was broken off goes on with `--resume`, to the same end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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

import rlhfjax.models as zoo
from rlhfjax import kl, masked, rollout, sharding
from rlhfjax.algorithms import rloo, sft
from rlhfjax.cli import plots
from rlhfjax.cli.run import Run
from rlhfjax.cli.samples import write_samples
from rlhfjax.cli.timing import Clock
from rlhfjax.data.batches import Padded, right_pad
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.text import DataError, LabelledText, read_labelled
from rlhfjax.feedback import choice, people
from rlhfjax.log_probs import response_log_probs
from rlhfjax.losses import reward
from rlhfjax.models import lora
from rlhfjax.types import Params, PreferenceBatch, Rollout

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ("<pad>", "<begin>", "<end>")
ASPECTS = ("polarity", "length", "words", "style")
WORD = re.compile(r"\w[\w'-]*|[^\w\s]")


@dataclass(frozen=True)
class Args:
    """Learns the tastes of many people at once."""

    data: Path | None = None
    """Folder with *.pos and *.neg files, one text a line; without it, text is generated."""
    out: Path = Path("runs/personalization")
    """Folder for everything that the run leaves behind."""
    seed: int = 0
    """Decides tastes, initial parameters and samples."""
    resume: bool = False
    """Go on with the run in --out, if there is one."""
    people: int = 16
    """How many there are."""
    rounds: int = 5
    """Rounds of feedback; the first one also teaches the shared reward."""
    comparisons: int = 32
    """Pairs that each is asked about in a round."""
    candidates: int = 128
    """Pairs that those are chosen from."""
    certainty: float = 5.0
    """How sure people are: they choose with σ(certainty·difference), in units of their taste."""
    members: int = 32
    """Reward heads in everybody's ensemble."""
    directions: int = 32
    """Size of a user's vector."""
    caution: float = 0.5
    """Standard deviations of the ensemble that a policy's reward lies below its mean."""
    texts: int = 4000
    """Texts to generate."""
    vocab: int = 512
    """Words of the vocabulary, at most."""
    width: int = 32
    """Size of the hidden states."""
    heads: int = 2
    """Attention heads."""
    tokens: int = 17
    """Longest text; longer ones are left out."""
    epochs: int = 8
    """Passes over the texts."""
    rank: int = 2
    """Of everybody's adapter."""
    iterations: int = 60
    """Updates of a policy in a round."""
    group: int = 16
    """Texts in an update."""
    learning_rate: float = 5e-3
    """Of the policies."""
    kl_coef: float = 2.0
    """Weight of the divergence from the language model."""
    judged: int = 1024
    """Texts of each policy that a person judges in the end, and held-out pairs."""
    step: int = 8
    """Comparisons between two points of the curves of accuracy."""
    timed: int = 3
    """Rounds that are timed for all people and for one; 0 leaves it out."""


MAY_CHANGE = ("data", "out", "resume", "timed")


def main(args: Args) -> dict[str, Any]:
    """Tells the whole story and returns what `summary.json` holds."""
    check(args)
    clock = Clock()
    texts = read_labelled(args.data) if args.data else generated(args.texts, args.seed)
    told = hashlib.sha256(repr([tuple(text) for text in texts]).encode()).hexdigest()
    mesh = sharding.mesh()
    settings = dataclasses.asdict(args)
    with (
        jax.set_mesh(mesh),
        Run(
            args.out, settings, may_change=MAY_CHANGE, mesh=mesh, resume=args.resume,
            fingerprint=told,
        ) as run,
    ):  # fmt: skip
        return story(args, texts, run, clock)


def check(args: Args) -> None:
    """Refuses what would fail only after minutes."""
    if args.candidates < args.comparisons:
        raise ValueError(
            f"--comparisons {args.comparisons} cannot be chosen from --candidates "
            f"{args.candidates}: raise the latter"
        )
    if min(args.rounds, args.people, args.members) < 2:
        raise ValueError("--rounds, --people and --members must be at least 2")
    if args.judged < args.people or args.directions > args.width:
        raise ValueError(
            f"--judged {args.judged} must be at least --people {args.people}, and --directions "
            f"{args.directions} at most --width {args.width}"
        )
    if args.comparisons * args.rounds % args.step:
        raise ValueError(
            f"--step {args.step} does not divide the {args.comparisons * args.rounds} comparisons"
        )


# The text.

GOOD = ("lovely", "warm", "fresh", "charming", "calm")
BAD = ("awful", "cold", "stale", "shabby", "noisy")
THINGS = ("coffee", "cake", "garden", "staff", "room", "music", "view", "soup")
VERBS = ("was", "felt")
DEGREES = ("very", "rather")
TAILS = ("today", "again")


def generated(num_texts: int, seed: int) -> list[LabelledText]:
    """Reviews of a small hotel, 5 to 16 words and marks; the label is the mood they are in."""
    rng = np.random.default_rng(seed)

    def pick(words: Sequence[str], probability: float = 1.0) -> str:
        return str(rng.choice(words)) if rng.random() < probability else ""

    def claim(good: bool) -> list[str]:
        kind = GOOD if good == (rng.random() < 0.85) else BAD
        return ["the", pick(THINGS), pick(VERBS), pick(DEGREES, 0.4), pick(kind)]

    def review(good: bool) -> str:
        words = [pick(("wow ,", "well ,"), 0.35), *claim(good)]
        if rng.random() < 0.5:
            words += [pick(("and", "but")), *claim(good)]
        words += [pick(TAILS, 0.3), "!" if rng.random() < 0.3 else "."]
        return " ".join(" ".join(words).split())

    return [LabelledText(review(i % 2 == 0), i % 2 == 0) for i in range(num_texts)]


def split_words(text: str) -> list[str]:
    return WORD.findall(text.lower())


class Vocabulary:
    """The most frequent words, and the texts that have no other."""

    def __init__(self, texts: Sequence[LabelledText], args: Args) -> None:
        counts = Counter(word for text in texts for word in split_words(text.text))
        self.words = [*SPECIAL, *(word for word, _ in counts.most_common(args.vocab))]
        self.ids = {word: i for i, word in enumerate(self.words)}
        whole = [([self.ids.get(w, PAD) for w in split_words(x.text)], x.label) for x in texts]
        fit = [(ids, label) for ids, label in whole if PAD not in ids and len(ids) < args.tokens]
        if len(fit) < 500 or len({label for _, label in fit}) < 2:
            raise DataError(
                f"{len(fit)} of {len(texts)} texts have only the {args.vocab} most frequent words "
                f"and at most {args.tokens - 1} of them: raise --vocab or --tokens, or give more"
            )
        self.texts = [[BEGIN, *ids, END] for ids, _ in fit]
        self.counts = np.zeros((2, len(self.words)))
        for ids, label in fit:
            np.add.at(self.counts[int(label)], ids, 1)

    def decode(self, tokens: Array) -> list[str]:
        return [" ".join(self.words[i] for i in row if i > END) for row in np.asarray(tokens)]


# The people.


class Tastes(NamedTuple):
    """What people like: tables of tokens that nothing which learns ever sees.

    Attributes:
      tables: [N, V], what each token of a text is worth to each.
      told: [N] for the reader.
    """

    tables: np.ndarray
    told: list[str]


def draw_tastes(vocabulary: Vocabulary, args: Args) -> Tastes:
    """One main aspect and a lesser one each; of every four with a main aspect one dislikes it."""
    rng = np.random.default_rng([args.seed, 1])
    negative, positive = vocabulary.counts + 1.0
    odds = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
    is_word = np.array([bool(re.match(r"\w", word)) for word in vocabulary.words])
    polarity = np.where(is_word & (np.abs(odds) > 0.5), odds, 0.0)
    polarity[: len(SPECIAL)] = 0.0
    style = np.array([float(word in "!?,;:") for word in vocabulary.words])
    length = is_word.astype(float)
    total = vocabulary.counts.sum(0)
    neutral = np.flatnonzero(is_word & (np.abs(odds) < 0.5) & (np.arange(len(total)) > END))
    content = [i for i in neutral if len(vocabulary.words[i]) > 3]
    content = sorted(content, key=lambda i: -total[i])[:24]
    # Worth in units of the standard deviation over texts, so that no aspect is louder than others.
    bags = np.zeros((len(vocabulary.texts), len(vocabulary.words)))
    for row, ids in enumerate(vocabulary.texts):
        np.add.at(bags[row], [i for i in ids if i > END], 1)

    def standard(table: np.ndarray) -> np.ndarray:
        return table / max((bags @ table).std(), 1e-6)

    tables, told = [], []
    for person in range(args.people):
        favourites = rng.choice(content, size=min(4, len(content)), replace=False)
        words = np.zeros(len(vocabulary.words))
        words[favourites] = 1.0
        aspects = [standard(table) for table in (polarity, length, words, style)]
        main = person % 4
        lesser = (main + rng.integers(1, 4)) % 4
        weights = {main: -1.0 if person // 4 % 4 == 3 else 1.0, lesser: rng.choice([-0.5, 0.5])}
        tables.append(standard(sum(weight * aspects[i] for i, weight in weights.items())))
        liked = ", ".join(f"{'+' if x > 0 else '−'}{ASPECTS[i]}" for i, x in weights.items())
        chosen = " ".join(vocabulary.words[i] for i in favourites)
        told.append(f"{liked} ({chosen})" if 2 in weights else liked)
    return Tastes(np.array(tables, np.float32), told)


def worth(table: Array, samples: Rollout) -> Array:
    """What a person thinks of texts, [B]."""
    return masked.sum(table[samples.responses], samples.response_mask, axis=1)


# What is shared, and what is a user's own.


class Own(NamedTuple):
    """A user.

    Attributes:
      members: [K, E], the ensemble's vectors.
      anchors: [K, E], where they began.
      policy: RLOO's state; its parameters are an adapter.
      pairs: all that the user ever compared.
      key: of the user's rounds.
    """

    members: Array
    anchors: Array
    policy: rloo.State
    pairs: PreferenceBatch
    key: Array


class Machine:
    """The functions of the experiment, pure; sizes and models are bound, arrays are arguments."""

    def __init__(self, vocab_size: int, args: Args) -> None:
        self.args = args
        self.model = zoo.decoder(
            zoo.DecoderConfig(
                vocab_size=vocab_size,
                context_length=args.tokens + 1,
                width=args.width,
                num_layers=1,
                num_heads=args.heads,
            )
        )
        self.head = zoo.linear_head(args.width, stddev=0.0)
        self.config = rloo.Config(
            num_tokens=args.tokens, pad_token=PAD, end_token=END, group_size=args.group
        )
        self.hyper = rloo.Hyperparameters(kl_coef=args.kl_coef)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate, eps=1e-5)
        )

    def adapted(self, base: Params) -> Any:
        return lora.on(self.model, base, combine=partial(lora.beside, scale=1.0))

    def write(self, base: Params, adapters: Params, key: Array, num: int) -> Rollout:
        prompts = jnp.full((num, 1), BEGIN, jnp.int32)
        return rollout.generate(
            self.adapted(base), adapters, prompts, prompts == BEGIN, key,
            num_tokens=self.args.tokens, pad_token=PAD, end_token=END,
        )  # fmt: skip

    def states(self, base: Params, tokens: Array, mask: Array) -> Array:
        """What the reward heads read: Σ over a text of the embeddings of its tokens, [B, D]."""
        embedded = base["embedding"]["embedding"][tokens]
        real = jnp.broadcast_to((mask & (tokens > END))[..., None], embedded.shape)
        return masked.sum(embedded, real, axis=1)

    def directions(self, states: Array) -> Params:
        """A head that says nothing yet, with directions in which texts differ by 1."""
        centred = states - states.mean(0)
        values, vectors = jnp.linalg.eigh(centred.T @ centred / len(states))
        most = slice(-self.args.directions, None)
        spread = jnp.sqrt(jnp.maximum(values[most], 1e-6 * values[-1]))
        head = self.head.init(jax.random.key(0))
        return head | {"directions": vectors[:, most] / spread}

    def scores(self, shared: Params, vector: Array, states: Array) -> Array:
        return self.head.apply(people.head_of(shared, vector), states)

    def differences(self, shared: Params, members: Array, first: Array, second: Array) -> Array:
        """By how much each member prefers the first of two texts, [K, B]."""
        scores = jax.vmap(partial(self.scores, shared), (0, None))
        return scores(members, first) - scores(members, second)

    def fit(
        self, shared: Params, members: Array, anchors: Array, better: Array, worse: Array,
        mask: Array,
    ) -> Array:  # fmt: skip
        """Each member's vector after these pairs; `better` and `worse` are states [M, D]."""

        def loss(vector: Array, anchor: Array) -> Array:
            both = (self.scores(shared, vector, x) for x in (better, worse))
            value, _ = reward.pairwise(*both, mask, reduce=masked.sum)
            return value + choice.anchored(vector, anchor, precision=1.0)

        optimizer = optax.adam(0.1)
        gradients = jax.vmap(jax.grad(loss))

        def update(_: int, carry: Any) -> Any:
            members, opt_state = carry
            updates, opt_state = optimizer.update(gradients(members, anchors), opt_state)
            return optax.apply_updates(members, updates), opt_state

        return jax.lax.fori_loop(0, 100, update, (members, optimizer.init(members)))[0]

    def fit_to(
        self, pairs: PreferenceBatch, base: Params, shared: Params, members: Array, anchors: Array
    ) -> Array:
        """`fit` to what somebody said."""
        better, worse = self.states(base, *pairs.sequences).reshape(2, -1, self.args.width)
        return self.fit(shared, members, anchors, better, worse, pairs.pairs)

    def prefer(self, key: Array, table: Array, first: Rollout, second: Rollout) -> PreferenceBatch:
        """What a person says of pairs."""
        margin = worth(table, first) - worth(table, second)
        wins = jax.random.bernoulli(key, jax.nn.sigmoid(self.args.certainty * margin))
        return people.compared(first, second, wins)

    def improve(
        self, policy: rloo.State, base: Params, shared: Params, members: Array, length: int
    ) -> tuple[rloo.State, dict[str, Array]]:
        """Updates of a policy on the lower bound of its reward's ensemble."""
        model, args = self.adapted(base), self.args
        reference = lora.nothing(policy.params)
        prompts = jnp.full((1, 1), BEGIN, jnp.int32)

        def update(policy: rloo.State, _: None) -> tuple[rloo.State, dict[str, Array]]:
            samples = rloo.sample(
                policy, prompts, prompts == BEGIN, self.hyper, model=model, config=self.config
            )
            states = self.states(base, samples.tokens, samples.attention_mask)
            scores = jax.vmap(partial(self.scores, shared), (0, None))(members, states)
            scores = choice.lower_bound(scores, coef=args.caution)
            return rloo.learn(
                policy, samples, scores, reference, self.hyper,
                model=model, optimizer=self.optimizer, config=self.config,
            )  # fmt: skip

        policy, metrics = jax.lax.scan(update, policy, length=length)
        return policy, jax.tree.map(lambda x: x[-10:].mean(), metrics)

    def round(
        self, own: Own, table: Array, base: Params, shared: Params
    ) -> tuple[Own, dict[str, Array]]:
        """Sample pairs, choose some, ask, fit the reward, improve the policy."""
        args = self.args
        number = own.pairs.pairs.sum() // args.comparisons
        sample_key, ask_key = jax.random.split(jax.random.fold_in(own.key, number))
        samples = self.write(base, own.policy.params, sample_key, 2 * args.candidates)
        first, second = (jax.tree.map(lambda x, i=i: x[i::2], samples) for i in (0, 1))
        states = self.states(base, samples.tokens, samples.attention_mask)
        differences = self.differences(shared, own.members, states[::2], states[1::2])
        places, _ = choice.spread(jax.nn.sigmoid(differences), num=args.comparisons)
        first, second = (jax.tree.map(lambda x: x[places], side) for side in (first, second))
        new = self.prefer(ask_key, table, first, second)
        pairs = people.remember(own.pairs, new, number * args.comparisons)
        members = self.fit_to(pairs, base, shared, own.members, own.anchors)
        policy, metrics = self.improve(own.policy, base, shared, members, args.iterations)
        chosen = differences[:, places]
        metrics |= {
            "choice/information": choice.mutual_information(differences).mean(),
            "choice/information_of_chosen": choice.mutual_information(chosen).mean(),
        }
        return Own(members, own.anchors, policy, pairs, own.key), metrics


class Shared(NamedTuple):
    """What everybody begins with.

    Attributes:
      head: of the reward, with directions; learnt from what all said in the first round.
      policy: RLOO's state on that reward.
      pairs: [N, M, …] what each said.
    """

    head: Params
    policy: rloo.State
    pairs: PreferenceBatch


def begin_shared(base: Params, tables: Array, key: Array, *, machine: Machine) -> Shared:
    """Everybody compares texts of the language model; one reward learns from all of them."""
    args = machine.args
    key, adapter_key, policy_key = jax.random.split(key, 3)
    adapters = lora.init(adapter_key, base, rank=args.rank, pattern="/(qkv|output|up|down)$")

    def ask(table: Array, key: Array) -> PreferenceBatch:
        sample_key, ask_key = jax.random.split(key)
        samples = machine.write(base, adapters, sample_key, 2 * args.comparisons)
        first, second = (jax.tree.map(lambda x, i=i: x[i::2], samples) for i in (0, 1))
        new = machine.prefer(ask_key, table, first, second)
        room = people.no_pairs(new, num_pairs=args.rounds * args.comparisons)
        return people.remember(room, new, 0)

    pairs = jax.vmap(ask)(tables, jax.random.split(key, len(tables)))
    # Of the rounds to come there is nothing yet.
    said = jax.tree.map(lambda x: x[:, : args.comparisons].reshape(-1, *x.shape[2:]), pairs)
    head = machine.directions(machine.states(base, *said.sequences))
    nothing = jnp.zeros((1, args.directions))
    vector = machine.fit_to(said, base, head, nothing, nothing)[0]
    head |= people.head_of(head, vector)
    return Shared(head, rloo.init(adapters, machine.optimizer, policy_key), pairs)


def begin_people(shared: Shared, base: Params, key: Array, *, machine: Machine) -> Own:
    """Everybody begins with the shared policy, and a reward of what they said so far."""
    args = machine.args
    member_key, key = jax.random.split(key)
    prior = partial(jax.random.normal, shape=(args.directions,))
    anchors = choice.members(prior, member_key, num_members=args.members)
    policy = rloo.init(shared.policy.params, machine.optimizer, key)
    nobody = Own(anchors, anchors, policy, people.user(shared.pairs, 0), key)
    everybody = people.start(nobody, num_users=len(shared.pairs.prompts))

    def fit(pairs: PreferenceBatch) -> Array:
        return machine.fit_to(pairs, base, shared.head, anchors, anchors)

    members = jax.vmap(fit)(shared.pairs)
    return everybody._replace(members=members, pairs=shared.pairs)


def active_and_random(
    base: Params, head: Params, tables: Array, key: Array, *, machine: Machine
) -> Array:
    """Accuracy on held-out pairs after every few comparisons, [people, 2, points]."""
    args = machine.args
    adapter_key, write_key, key = jax.random.split(key, 3)
    nothing = lora.init(adapter_key, base, rank=args.rank, pattern="/qkv$")
    # The texts of pairs that may be asked about, and those of held-out ones.
    size = 16 * args.candidates
    samples = machine.write(base, nothing, write_key, size + 2 * args.judged)
    states = machine.states(base, samples.tokens, samples.attention_mask)
    pool, test = states[:size], states[size:]
    num_points = args.rounds * args.comparisons // args.step
    prior = partial(jax.random.normal, shape=(args.directions,))

    def of_person(table: Array, key: Array) -> Array:
        answer_key, member_key, choice_key = jax.random.split(key, 3)
        worths = worth(table, samples)
        margins, held_out = (
            worths[:size:2] - worths[1:size:2],
            worths[size::2] - worths[size + 1 :: 2],
        )
        wins = jax.random.bernoulli(answer_key, jax.nn.sigmoid(args.certainty * margins))[:, None]
        first, second = pool[::2], pool[1::2]
        better, worse = jnp.where(wins, first, second), jnp.where(wins, second, first)
        anchors = choice.members(prior, member_key, num_members=args.members)

        def point(carry: Any, key: Array, actively: Array) -> tuple[Any, Array]:
            members, asked = carry
            d = machine.differences(head, members, first, second)
            chosen, _ = choice.spread(jax.nn.sigmoid(d), ~asked, num=args.step)
            drawn, _ = choice.most(jax.random.uniform(key, asked.shape), ~asked, num=args.step)
            places = jnp.where(actively, chosen, drawn)
            asked = asked.at[places].set(True)
            # So many rows hold all that will ever be asked.
            rows = jnp.argsort(~asked)[: num_points * args.step]
            members = machine.fit(head, members, anchors, better[rows], worse[rows], asked[rows])
            told = machine.differences(head, members, test[::2], test[1::2]).mean(0)
            differ = jnp.abs(held_out) > 1e-4
            accuracy = masked.mean((told > 0) == (held_out > 0), differ)
            return (members, asked), accuracy

        def of_arm(actively: Array) -> Array:
            start = anchors, jnp.zeros(len(first), bool)
            return jax.lax.scan(
                lambda carry, key: point(carry, key, actively),
                start,
                jax.random.split(choice_key, num_points),
            )[1]

        return jax.vmap(of_arm)(jnp.array([True, False]))

    return jax.vmap(of_person)(tables, jax.random.split(key, len(tables)))


def train_sft(args: Args, machine: Machine, vocabulary: Vocabulary, key: Array, run: Run) -> Params:
    """Maximum likelihood of the texts."""
    batch = right_pad(
        vocabulary.texts, num_rows=len(vocabulary.texts), length=args.tokens + 1, pad_token=PAD
    )
    size = 64
    in_epoch = len(vocabulary.texts) // size
    num_updates = args.epochs * in_epoch
    schedule = optax.cosine_decay_schedule(5e-3, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    update = sft.make_step(machine.model, optimizer)

    def epoch(number: int, start: int) -> Iterator[Padded]:
        order = np.random.default_rng([args.seed, 2, number]).permutation(len(batch.tokens))
        for i in range(start, in_epoch):
            rows = order[i * size : (i + 1) * size]
            yield Padded(batch.tokens[rows], batch.mask[rows])

    def step(state: sft.TrainState, rows: Padded) -> tuple[sft.TrainState, Any]:
        tokens, mask = sharding.rows(rows, run.mesh)
        return update(state, tokens, mask, mask)

    trained = run.train(
        "sft",
        lambda key: sft.init(machine.model.init(key), optimizer),
        key,
        step=step,
        batches=partial(batches_from, epoch=epoch),
        num_steps=num_updates,
        save_every=1000,
        show={"loss": "loss"},
    )
    return trained.state.params


def numbered(_: int, start: int) -> Iterator[int]:
    """Rounds have no data but what people say."""
    yield from range(start, 1_000_000)


def story(args: Args, texts: list[LabelledText], run: Run, clock: Clock) -> dict[str, Any]:
    """From texts to a policy for everybody."""
    keys = [sharding.put(key, run.mesh) for key in jax.random.split(jax.random.key(args.seed), 6)]
    vocabulary = Vocabulary(texts, args)
    tastes = draw_tastes(vocabulary, args)
    machine = Machine(len(vocabulary.words), args)
    with clock("sft"):
        base = train_sft(args, machine, vocabulary, keys[0], run)

    # 1. In units of the language model's own texts, a person's taste has variance 1.
    with clock("shared"):
        tables = jax.jit(partial(in_units, machine=machine))(base, tastes.tables, keys[1])
        tables = sharding.put(np.asarray(tables), run.mesh)

        # 2. What most like.
        @sharding.Step
        def improve(state: Shared, base: Params) -> tuple[Shared, dict[str, Array]]:
            vectors = jnp.zeros((1, args.directions))
            policy, metrics = machine.improve(
                state.policy, base, state.head, vectors, args.iterations
            )
            return state._replace(policy=policy), metrics

        trained = run.train(
            "shared",
            partial(begin_shared, machine=machine),
            base, tables, keys[2],
            step=lambda state, _: improve(state, base),
            batches=partial(batches_from, epoch=numbered),
            num_steps=args.rounds,
            save_every=1,
            show={"score": "objective/scores", "kl": "objective/kl"},
        )  # fmt: skip
        shared = trained.state

    # 3. What each likes: the state of all is one tree, and one checkpoint.
    @sharding.Step
    def learn(everybody: Own, tables: Array, base: Params, head: Params) -> Any:
        wanted = jnp.ones(len(tables), bool)
        everybody, metrics = people.together(machine.round)(everybody, wanted, tables, base, head)
        return everybody, jax.tree.map(jnp.mean, metrics)

    with clock("people"):
        trained = run.train(
            "people",
            partial(begin_people, machine=machine),
            shared, base, keys[3],
            step=lambda state, _: learn(state, tables, base, shared.head),
            batches=partial(batches_from, epoch=numbered),
            num_steps=args.rounds - 1,
            save_every=1,
            show={"score": "objective/scores", "kl": "objective/kl"},
        )  # fmt: skip
    everybody = trained.state

    with clock("judging"):
        judged = jax.jit(partial(judge, machine=machine))(
            base, shared, everybody.policy.params, tables, keys[4]
        )
        study = partial(active_and_random, machine=machine)
        accuracy = np.asarray(jax.jit(study)(base, shared.head, tables, keys[5]), np.float64)
    result, samples = jax.device_get(judged)
    gain = result["own"].mean(1) - result["shared"].mean(1)
    error = np.sqrt((result["own"].var(1) + result["shared"].var(1)) / args.judged)
    asked = args.step * np.arange(1, accuracy.shape[2] + 1)
    curves = dict(zip(("active", "random"), accuracy.mean(0), strict=True))
    summary: dict[str, Any] = {
        "people/better_off": int((gain > 0).sum()),
        "people/better_off_by_two_errors": int((gain > 2 * error).sum()),
        "people/mean_gain": float(gain.mean()),
        "people": [
            {
                "taste": told,
                "shared": float(result["shared"][i].mean()),
                "own": float(result["own"][i].mean()),
                "gain": float(gain[i]),
                "gain_error": float(error[i]),
                "kl": float(result["kl"][i]),
            }
            for i, told in enumerate(tastes.told)
        ],
        "shared/kl": float(result["shared_kl"]),
        "choice/comparisons": asked.tolist(),
        **{f"choice/accuracy_{name}": x.tolist() for name, x in curves.items()},
        "choice/share_of_comparisons": share_of_comparisons(asked, **curves),
        "compilations_after_first_round": trained.recompilations,
        "data/texts": len(vocabulary.texts),
        "data/words": len(vocabulary.words),
    }
    if args.timed:
        with clock("timing"):
            summary |= timing(learn, everybody, tables, base, shared.head, args.timed)
    summary |= {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}
    summary |= {"seconds/total": clock.total(), "device": jax.devices()[0].device_kind}
    picture(summary, run.out / "people.png")
    # Of person i the text i: the shared policy's are the same for all.
    each = np.arange(args.people)
    before, after = (vocabulary.decode(x) for x in (samples[0][each], samples[1][each, each]))
    worths = {name: result[name][each, each] for name in ("shared", "own")}
    write_samples(
        run.out / "samples.md",
        [f"{i + 1}: {told}" for i, told in enumerate(tastes.told)],
        before,
        after,
        scores_before=worths["shared"],
        scores_after=worths["own"],
        gold_before=worths["shared"] > 0,
        gold_after=worths["own"] > 0,
    )
    run.write("summary.json", summary)
    return summary


def in_units(base: Params, tables: Array, key: Array, *, machine: Machine) -> Array:
    """Tables [N, V] by which the language model's texts have a worth of variance 1."""
    nothing = lora.init(key, base, rank=1, pattern="/qkv$")
    samples = machine.write(base, nothing, key, 2048)
    worths = jax.vmap(worth, (0, None))(tables, samples)
    return tables / jnp.maximum(worths.std(1), 1e-6)[:, None]


def judge(
    base: Params, shared: Shared, adapters: Params, tables: Array, key: Array, *, machine: Machine
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """What each thinks of the shared policy's texts and of their own policy's, and KLs."""
    num = machine.args.judged

    def write_and_compare(adapters: Params, key: Array) -> tuple[Rollout, Array]:
        samples = machine.write(base, adapters, key, num)
        reference, _ = response_log_probs(
            machine.model, base, samples.tokens, samples.attention_mask, machine.args.tokens
        )
        mask = samples.response_mask
        return samples, masked.sum(kl.k1(samples.log_probs, reference), mask, axis=1).mean()

    # One after the other: so many texts of all would not stay in the cache.
    first = shared.policy.params
    written = jax.tree.map(
        lambda x, own: jnp.concatenate([jnp.zeros_like(x)[None], x[None], own]), first, adapters
    )
    keys = jax.random.split(key, len(tables) + 2)
    samples, kls = jax.lax.map(lambda x: write_and_compare(*x), (written, keys))
    zero, common = (people.user(samples, place) for place in (0, 1))
    own = people.user(samples, slice(2, None))
    centre = jax.vmap(worth, (0, None))(tables, zero).mean(1, keepdims=True)
    numbers = {
        "shared": jax.vmap(worth, (0, None))(tables, common) - centre,
        "own": jax.vmap(worth)(tables, own) - centre,
        "kl": kls[2:],
        "shared_kl": kls[1],
    }
    return numbers, (common.responses, own.responses)


def share_of_comparisons(asked: np.ndarray, active: np.ndarray, random: np.ndarray) -> float | None:
    """The comparisons after which active ones are as good as random ones ever get, as a share.

    None where they never are. Between two points the curve of the active ones is a line.
    """
    best = random.max()
    if active.max() < best:
        return None
    at = int(np.argmax(active >= best))
    if at == 0:
        return float(asked[0] / asked[random.argmax()])
    part = (best - active[at - 1]) / (active[at] - active[at - 1])
    return float((asked[at - 1] + part * (asked[at] - asked[at - 1])) / asked[random.argmax()])


def timing(
    learn: Any, everybody: Own, tables: Array, base: Params, head: Params, rounds: int
) -> dict[str, float]:
    """Seconds of a round of all and of one, taken in turns, the fastest of each."""
    one = jax.tree.map(lambda x: x[:1], (everybody, tables))
    states = {"all": (everybody, tables), "one": one}
    taken = dict.fromkeys(states, float("inf"))
    for number in range(rounds + 1):  # the first one compiles
        for name, (state, own) in states.items():
            fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            start = time.perf_counter()
            jax.block_until_ready(learn(fresh, own, base, head))
            if number:
                taken[name] = min(taken[name], time.perf_counter() - start)
    return {
        "seconds/round_of_all": taken["all"],
        "seconds/round_of_one": taken["one"],
        "seconds/ratio": taken["all"] / taken["one"],
    }


def picture(summary: dict[str, Any], path: Path) -> None:
    """Accuracy over comparisons, and what each gains."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, colour in (("active", plots.BLUE), ("random", plots.ORANGE)):
            x, y = summary["choice/comparisons"], summary[f"choice/accuracy_{name}"]
            left.plot(x, y, color=colour, label=f"{name} pairs")
        best = max(summary["choice/accuracy_random"])
        left.axhline(best, color=plots.FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        left.set_xlabel("comparisons of each person")
        left.set_ylabel("accuracy on held-out pairs")
        left.set_title("Choosing what to ask", loc="left", fontsize=9.5, fontweight="bold")
        left.legend(frameon=False, loc="lower right")
        persons = summary["people"]
        places = np.arange(1, len(persons) + 1)
        for i, person in zip(places, persons, strict=True):
            right.plot([i, i], [person["shared"], person["own"]], color=plots.FAINT, linewidth=1)
        shown = (("shared", "shared policy", plots.ORANGE), ("own", "own policy", plots.BLUE))
        for name, label, colour in shown:
            worths = [person[name] for person in persons]
            errors = [2 * person["gain_error"] for person in persons]
            right.errorbar(
                places, worths, errors if name == "own" else None, fmt="o", markersize=4,
                color=colour, elinewidth=1, label=label,
            )  # fmt: skip
        right.axhline(0, color=plots.FAINT, linewidth=0.8, zorder=0)
        right.set_xticks(places)
        right.set_xlabel("person")
        right.set_ylabel("worth to them, sd of the first texts")
        right.set_title("What each gains", loc="left", fontsize=9.5, fontweight="bold")
        right.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            borderpad=0,
            fontsize=8,
        )
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    # A device a core: XLA does not share out operations as small as these among threads.
    of_process = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    jax.config.update("jax_num_cpu_devices", len(of_process(0)))
    print(json.dumps(main(tyro.cli(Args)), indent=2))
