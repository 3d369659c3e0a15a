"""Sixteen people who like different texts, and a policy for each that learns from comparisons.

A small language model learns to write. Simulated people with hidden tastes, of which some
contradict others, compare its texts: 32 pairs each, from which a reward and a policy learn what
most like (stage "shared"). Then everybody begins with those and goes on alone: rounds of sampling
pairs from one's own policy, asking about the 32 that an ensemble finds most informative, fitting
one's own reward and training one's own policy on its lower bound (stage "people"). A user is a
vector that the reward head reads and a low-rank adapter of the policy; all users are one program.

Tastes cancel where they contradict each other, so that the shared reward moves its policy little.
A rival is trained at last that moves as far as people's own (stage "pooled"): its reward learns
from everything that all of them ever said and is made louder, or less so, until the policy is as
many nats away as that of the middle person; it has as many updates as they.

    python experiments/personalization.py --out runs/personalization

The folder then has `summary.json`, `metrics.jsonl`, `samples.md` and `people.png`: what each gains
over these two policies by their own taste, what people think of each other's, and how many
comparisons chosen pairs take for the accuracy of random ones. A run that was broken off goes on
with `--resume`, to the same end.
"""

from __future__ import annotations

import dataclasses
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
from rlhfjax.data.text import DataError, LabelledText, fingerprint, read_labelled
from rlhfjax.feedback import choice, people
from rlhfjax.log_probs import response_log_probs
from rlhfjax.losses import reward
from rlhfjax.models import lora
from rlhfjax.types import Params, PreferenceBatch, Rollout

PAD, BEGIN, END, RARE = 0, 1, 2, 3
SPECIAL = ("<pad>", "<begin>", "<end>", "…")
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
    """Rounds of feedback; the first one also teaches what people begin with."""
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
    """Words of the vocabulary, at most; rarer ones are all the same."""
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
    group: int = 10
    """Texts in an update."""
    learning_rate: float = 5e-3
    """Of the policies."""
    kl_coef: float = 2.0
    """Weight of the divergence from the language model."""
    judged: int = 1024
    """Texts of each policy that people judge in the end, and pairs of the study of choices."""
    step: int = 8
    """Comparisons between two points of the curves of accuracy."""
    timed: int = 8
    """Rounds that are timed, of all people and of one; 0 leaves it out."""


def main(args: Args) -> dict[str, Any]:
    """Tells the whole story and returns what `summary.json` holds."""
    check(args)
    clock = Clock()
    texts = read_labelled(args.data) if args.data else generated(args.texts, args.seed)
    mesh = sharding.mesh()
    with (
        jax.set_mesh(mesh),
        Run(
            args.out, dataclasses.asdict(args), may_change=("data", "out", "resume", "timed"),
            mesh=mesh, resume=args.resume, fingerprint=fingerprint(texts),
        ) as run,
    ):  # fmt: skip
        return story(args, texts, run, clock)


def check(args: Args) -> None:
    """Refuses what would fail only after minutes."""
    asked = args.rounds * args.comparisons
    if args.candidates < args.comparisons:
        raise ValueError(
            f"--comparisons {args.comparisons} cannot be chosen from --candidates "
            f"{args.candidates}: raise the latter"
        )
    if min(args.rounds, args.people, args.members) < 2:
        raise ValueError("--rounds, --people and --members must be at least 2")
    if args.judged < max(args.people, asked) or args.directions > args.width:
        raise ValueError(
            f"--judged {args.judged} must be at least --people {args.people} and the {asked} "
            f"comparisons, and --directions {args.directions} at most --width {args.width}"
        )
    if asked % args.step:
        raise ValueError(f"--step {args.step} does not divide the {asked} comparisons")


# The text.

GOOD = ("lovely", "warm", "fresh", "charming", "calm")
BAD = ("awful", "cold", "stale", "shabby", "noisy")
THINGS = ("coffee", "cake", "garden", "staff", "room", "music", "view", "soup")


def generated(num_texts: int, seed: int) -> list[LabelledText]:
    """Reviews of a small hotel, 5 to 16 words and marks; the label is the mood they are in."""
    rng = np.random.default_rng(seed)

    def pick(words: Sequence[str], probability: float = 1.0) -> str:
        return str(rng.choice(words)) if rng.random() < probability else ""

    def claim(good: bool) -> list[str]:
        kind = GOOD if good == (rng.random() < 0.85) else BAD
        return [
            "the",
            pick(THINGS),
            pick(("was", "felt")),
            pick(("very", "rather"), 0.4),
            pick(kind),
        ]

    def review(good: bool) -> str:
        words = [pick(("wow ,", "well ,"), 0.35), *claim(good)]
        if rng.random() < 0.5:
            words += [pick(("and", "but")), *claim(good)]
        words += [pick(("today", "again"), 0.3), "!" if rng.random() < 0.3 else "."]
        return " ".join(" ".join(words).split())

    return [LabelledText(review(i % 2 == 0), i % 2 == 0) for i in range(num_texts)]


class Vocabulary:
    """The most frequent words, and the texts that are short enough."""

    def __init__(self, texts: Sequence[LabelledText], args: Args) -> None:
        split = [(WORD.findall(text.text.lower()), text.label) for text in texts]
        split = [(words, label) for words, label in split if len(words) < args.tokens]
        liked = sum(label for _, label in split)
        if min(liked, len(split) - liked) < 250:
            raise DataError(
                f"{len(split)} of {len(texts)} texts have at most {args.tokens - 1} words and "
                f"marks, {liked} of them liked, and 250 of either kind are needed: raise --tokens, "
                "or give more texts"
            )
        counts = Counter(word for words, _ in split for word in words)
        self.words = [*SPECIAL, *(word for word, _ in counts.most_common(args.vocab))]
        self.ids = {word: i for i, word in enumerate(self.words)}
        rows = [[BEGIN, *(self.ids.get(x, RARE) for x in words), END] for words, _ in split]
        self.texts = right_pad(rows, num_rows=len(rows), length=args.tokens + 1, pad_token=PAD)
        self.counts = np.zeros((2, len(self.words)))
        for row, (_, label) in zip(rows, split, strict=True):
            np.add.at(self.counts[int(label)], row[1:-1], 1)

    def decode(self, tokens: Array) -> list[str]:
        return [" ".join(self.words[i] for i in row if i > END) for row in np.asarray(tokens)]


# The people.


def draw_tastes(vocabulary: Vocabulary, args: Args) -> tuple[np.ndarray, list[str]]:
    """One main aspect and a lesser one each; of every four with a main aspect one dislikes it.

    Returns:
      tables [N, V] of what each token of a text is worth to each, which nothing that learns ever
      sees; what they are, for the reader.
    """
    rng = np.random.default_rng([args.seed, 1])
    words, counts = vocabulary.words, vocabulary.counts
    negative, positive = counts + 1.0
    odds = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
    is_word = np.array([bool(re.match(r"\w", word)) for word in words])
    polarity = np.where(is_word & (np.abs(odds) > 0.5), odds, 0.0)
    style = np.array([float(word in "!?,;:") for word in words])
    length = is_word.astype(float)
    length[RARE] = 1.0
    neutral = np.flatnonzero(is_word & (np.abs(odds) < 0.5))
    content = [i for i in neutral if len(words[i]) > 3]
    content = sorted(content, key=lambda i: -counts[:, i].sum())[:24]
    if len(content) < 4:
        raise DataError(f"{len(content)} words of the texts can be favourites: give other texts")

    def standard(table: np.ndarray, aspect: str = "words") -> np.ndarray:
        """In standard deviations over texts, so that no aspect is louder than others."""
        spread = table[vocabulary.texts.tokens].sum(1).std()
        if spread == 0.0:
            raise DataError(f"texts do not differ in {aspect}, which some people go by")
        return table / spread

    tables, told = [], []
    for person in range(args.people):
        favourites = rng.choice(content, size=4, replace=False)
        liked = np.isin(np.arange(len(words)), favourites).astype(float)
        aspects = [*map(standard, (polarity, length, liked, style), ASPECTS)]
        main = person % 4
        lesser = (main + rng.integers(1, 4)) % 4
        weights = {main: -1.0 if person // 4 % 4 == 3 else 1.0, lesser: rng.choice([-0.5, 0.5])}
        tables.append(standard(sum(weight * aspects[i] for i, weight in weights.items())))
        named = ", ".join(f"{'+' if x > 0 else '−'}{ASPECTS[i]}" for i, x in weights.items())
        chosen = " ".join(words[i] for i in favourites)
        told.append(f"{named} ({chosen})" if 2 in weights else named)
    return np.array(tables, np.float32), told


def worth(tables: Any, samples: Rollout) -> Any:
    """What people, or one of them, think of texts: [N, V] or [V] → [N, B] or [B]."""
    return (tables[..., samples.responses] * samples.response_mask).sum(-1)


def pairs_of(samples: Rollout) -> tuple[Rollout, Rollout]:
    """The first texts of pairs, and the second ones."""
    first, second = (jax.tree.map(lambda x, i=i: x[i::2], samples) for i in (0, 1))
    return first, second


# What is for all, and what is a user's own.


class Shared(NamedTuple):
    """What is for all.

    Attributes:
      head: of the reward, with directions; what it says is left to vectors, whose length is the
        spread of that reward over texts.
      members: [K, E], the ensemble's vectors.
      louder: what their mean is multiplied by for the policy.
      policy: RLOO's state; its parameters are an adapter.
    """

    head: Params
    members: Array
    louder: Array
    policy: rloo.State


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
    """The functions of the experiment; sizes and models are bound, arrays are arguments."""

    def __init__(self, vocab_size: int, args: Args) -> None:
        self.args = args
        config = zoo.DecoderConfig(
            vocab_size, args.tokens + 1, num_layers=1, width=args.width, num_heads=args.heads
        )
        self.model = zoo.decoder(config)
        self.head = zoo.linear_head(args.width, stddev=0.0)
        self.config = rloo.Config(
            num_tokens=args.tokens, pad_token=PAD, end_token=END, group_size=args.group
        )
        self.hyper = rloo.Hyperparameters(kl_coef=args.kl_coef)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate, eps=1e-5)
        )
        self.step_of_shared = sharding.Step(self.improve_shared)
        self.step_of_people = sharding.Step(self.rounds)

    def adapted(self, base: Params) -> Any:
        return lora.on(self.model, base, combine=partial(lora.beside, scale=1.0))

    def adapters(self, base: Params, key: Array) -> Params:
        """Of a policy that writes as the language model does."""
        return lora.init(key, base, rank=self.args.rank, pattern="/(qkv|output|up|down)$")

    def write(self, base: Params, adapters: Params, key: Array, num: int) -> Rollout:
        prompts = jnp.full((num, 1), BEGIN, jnp.int32)
        return rollout.generate(
            self.adapted(base), adapters, prompts, prompts == BEGIN, key,
            num_tokens=self.args.tokens, pad_token=PAD, end_token=END,
        )  # fmt: skip

    @partial(jax.jit, static_argnums=0)
    def judged(self, base: Params, adapters: Params, key: Array) -> tuple[Rollout, Array]:
        """Texts of a policy, and its divergence from the language model in nats."""
        samples = self.write(base, adapters, key, self.args.judged)
        reference, _ = response_log_probs(
            self.model, base, samples.tokens, samples.attention_mask, self.args.tokens
        )
        divergence = kl.k1(samples.log_probs, reference)
        return samples, masked.sum(divergence, samples.response_mask, axis=1).mean()

    def states(self, base: Params, tokens: Array, mask: Array) -> Array:
        """What the reward heads read: Σ over a text of the embeddings of its tokens, [B, D]."""
        embedded = base["embedding"]["embedding"][tokens]
        real = jnp.broadcast_to((mask & (tokens > END))[..., None], embedded.shape)
        return masked.sum(embedded, real, axis=1)

    def directions(self, states: Array) -> Params:
        """A head that says nothing yet, with directions in which texts vary by 1."""
        centred = states - states.mean(0)
        values, vectors = jnp.linalg.eigh(centred.T @ centred / len(states))
        most = slice(-self.args.directions, None)
        spread = jnp.sqrt(jnp.maximum(values[most], 1e-6 * values[-1]))
        head = self.head.init(jax.random.key(0))
        return head | {"directions": vectors[:, most] / spread}

    def scores(self, shared: Params, members: Array, states: Array) -> Array:
        """Of each member, [K, B]."""
        heads = jax.vmap(partial(people.head_of, shared))(members)
        return jax.vmap(self.head.apply, (0, None))(heads, states)

    def differences(self, shared: Params, members: Array, first: Array, second: Array) -> Array:
        """By how much each member prefers the first of two texts, [K, B]."""
        return self.scores(shared, members, first) - self.scores(shared, members, second)

    def fit(
        self, shared: Params, members: Array, anchors: Array, better: Array, worse: Array,
        mask: Array,
    ) -> Array:  # fmt: skip
        """Each member's vector after these pairs; `better` and `worse` are states [M, D]."""

        def loss(members: Array) -> Array:
            # The head is linear: of a difference it says the difference of the scores.
            margins = self.scores(shared, members, better - worse)
            real = jnp.broadcast_to(mask, margins.shape)
            value, _ = reward.pairwise(margins, 0 * margins, real, reduce=masked.sum)
            return value + choice.anchored(members, anchors, precision=1.0)

        optimizer = optax.adam(0.1)

        def update(_: int, carry: Any) -> Any:
            members, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(members), opt_state)
            return optax.apply_updates(members, updates), opt_state

        return jax.lax.fori_loop(0, 100, update, (members, optimizer.init(members)))[0]

    def fit_to(
        self, pairs: PreferenceBatch, base: Params, shared: Params, members: Array, anchors: Array
    ) -> Array:
        """`fit` to what somebody said."""
        better, worse = self.states(base, *pairs.sequences).reshape(2, -1, self.args.width)
        return self.fit(shared, members, anchors, better, worse, pairs.pairs)

    def prefer(self, key: Array, table: Array, first: Rollout, second: Rollout) -> Array:
        """Which of the first ones somebody prefers to the second, [B]."""
        margins = worth(table, first) - worth(table, second)
        return jax.random.bernoulli(key, jax.nn.sigmoid(self.args.certainty * margins))

    @partial(jax.jit, static_argnums=0)
    def first_round(self, tables: Array, texts: Rollout, key: Array) -> PreferenceBatch:
        """What all say of the language model's texts, with room for the rounds to come."""
        num = self.args.comparisons

        def ask(table: Array, key: Array, number: Array) -> PreferenceBatch:
            places = (number * num + jnp.arange(num)) % self.args.judged
            first, second = pairs_of(texts)
            first, second = (jax.tree.map(lambda x: x[places], x) for x in (first, second))
            new = people.compared(first, second, self.prefer(key, table, first, second))
            return people.remember(people.no_pairs(new, num_pairs=num * self.args.rounds), new, 0)

        keys = jax.random.split(key, len(tables))
        return jax.vmap(ask)(tables, keys, jnp.arange(len(tables)))

    def begin_shared(
        self, base: Params, texts: Rollout, pairs: PreferenceBatch, key: Array
    ) -> Shared:
        """One reward of everything that all said, and a policy that has learnt nothing yet."""
        anchor_key, adapter_key, policy_key = jax.random.split(key, 3)
        head = self.directions(self.states(base, texts.tokens, texts.attention_mask))
        said = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
        anchors = self.prior(anchor_key)
        members = self.fit_to(said, base, head, anchors, anchors)
        policy = rloo.init(self.adapters(base, adapter_key), self.optimizer, policy_key)
        return Shared(head, members, jnp.float32(1.0), policy)

    def begin_people(self, base: Params, shared: Shared, pairs: PreferenceBatch, key: Array) -> Own:
        """Everybody begins with the shared policy, and a reward of what they said so far."""
        anchor_key, key = jax.random.split(key)
        anchors = shared.members.mean(0) + self.prior(anchor_key)
        policy = rloo.init(shared.policy.params, self.optimizer, key)
        nobody = Own(anchors, anchors, policy, people.user(pairs, 0), key)
        fit = partial(self.fit_to, base=base, shared=shared.head, members=anchors, anchors=anchors)
        everybody = people.start(nobody, num_users=self.args.people)
        return everybody._replace(members=jax.vmap(fit)(pairs), pairs=pairs)

    def prior(self, key: Array) -> Array:
        draw = partial(jax.random.normal, shape=(self.args.directions,))
        return choice.members(draw, key, num_members=self.args.members)

    def improve(
        self, policy: rloo.State, base: Params, shared: Params, members: Array
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
            scores = choice.lower_bound(self.scores(shared, members, states), coef=args.caution)
            return rloo.learn(
                policy, samples, scores, reference, self.hyper,
                model=model, optimizer=self.optimizer, config=self.config,
            )  # fmt: skip

        policy, metrics = jax.lax.scan(update, policy, length=args.iterations)
        return policy, jax.tree.map(lambda x: x[-10:].mean(), metrics)

    def improve_shared(
        self, state: Shared, base: Params, nats: Array
    ) -> tuple[Shared, dict[str, Array]]:
        """The same for all, on a reward so loud that the policy goes so far; 0: as it is."""
        vector = state.members.mean(0)
        members = state.members + (state.louder - 1.0) * vector
        policy, metrics = self.improve(state.policy, base, state.head, members)
        # The divergence grows with the square of the reward.
        change = jnp.sqrt(nats / jnp.maximum(metrics["objective/kl"], 1e-6))
        louder = jnp.where(nats > 0, state.louder * jnp.clip(change, 0.5, 2.0), state.louder)
        return state._replace(louder=louder, policy=policy), metrics | {"louder": state.louder}

    def round(
        self, own: Own, table: Array, base: Params, shared: Params
    ) -> tuple[Own, dict[str, Array]]:
        """Sample pairs, choose some, ask, fit the reward, improve the policy."""
        num = self.args.comparisons
        number = own.pairs.pairs.sum() // num
        sample_key, ask_key = jax.random.split(jax.random.fold_in(own.key, number))
        samples = self.write(base, own.policy.params, sample_key, 2 * self.args.candidates)
        states = self.states(base, samples.tokens, samples.attention_mask)
        differences = self.differences(shared, own.members, *pairs_of(states))
        places, _ = choice.spread(jax.nn.sigmoid(differences), num=num)
        first, second = (jax.tree.map(lambda x: x[places], side) for side in pairs_of(samples))
        new = people.compared(first, second, self.prefer(ask_key, table, first, second))
        pairs = people.remember(own.pairs, new, number * num)
        members = self.fit_to(pairs, base, shared, own.members, own.anchors)
        policy, metrics = self.improve(own.policy, base, shared, members)
        information = choice.mutual_information(differences)
        metrics |= {
            "choice/information": information.mean(),
            "choice/information_of_chosen": information[places].mean(),
        }
        return Own(members, own.anchors, policy, pairs, own.key), metrics

    def rounds(
        self, everybody: Own, tables: Array, base: Params, shared: Params
    ) -> tuple[Own, dict[str, Array]]:
        """A round of everybody."""
        wanted = jnp.ones(len(tables), bool)
        everybody, metrics = people.together(self.round)(everybody, wanted, tables, base, shared)
        middle = jnp.median(metrics["objective/kl"])
        return everybody, jax.tree.map(jnp.mean, metrics) | {"objective/kl_of_middle": middle}

    @partial(jax.jit, static_argnums=0)
    def study(
        self, base: Params, shared: Shared, tables: Array, pool: Rollout, held_out: Rollout,
        key: Array,
    ) -> Array:  # fmt: skip
        """Accuracy on held-out pairs after every few comparisons, [people, 2, points].

        Somebody's reward learns from pairs of the pool, chosen ones in the first arm and random
        ones in the second.
        """
        step, num = self.args.step, self.args.rounds * self.args.comparisons
        (first, second), (one, other) = (
            pairs_of(self.states(base, x.tokens, x.attention_mask)) for x in (pool, held_out)
        )

        def of_person(table: Array, key: Array) -> Array:
            answer_key, member_key, choice_key = jax.random.split(key, 3)
            wins = self.prefer(answer_key, table, *pairs_of(pool))[:, None]
            better, worse = jnp.where(wins, first, second), jnp.where(wins, second, first)
            truth = jnp.subtract(*pairs_of(worth(table, held_out)))
            anchors = shared.members.mean(0) + self.prior(member_key)

            def point(carry: Any, key: Array, actively: Array) -> tuple[Any, Array]:
                members, asked = carry
                d = self.differences(shared.head, members, first, second)
                chosen, _ = choice.spread(jax.nn.sigmoid(d), ~asked, num=step)
                drawn, _ = choice.most(jax.random.uniform(key, asked.shape), ~asked, num=step)
                asked = asked.at[jnp.where(actively, chosen, drawn)].set(True)
                # So many rows hold all that will ever be asked.
                rows = jnp.argsort(~asked)[:num]
                members = self.fit(
                    shared.head, members, anchors, better[rows], worse[rows], asked[rows]
                )
                told = self.differences(shared.head, members, one, other).mean(0)
                accuracy = masked.mean((told > 0) == (truth > 0), jnp.abs(truth) > 1e-4)
                return (members, asked), accuracy

            def of_arm(actively: Array) -> Array:
                start = anchors, jnp.zeros(len(first), bool)
                keys = jax.random.split(choice_key, num // step)
                return jax.lax.scan(partial(point, actively=actively), start, keys)[1]

            return jax.vmap(of_arm)(jnp.array([True, False]))

        return jax.vmap(of_person)(tables, jax.random.split(key, len(tables)))


def train_sft(args: Args, machine: Machine, vocabulary: Vocabulary, key: Array, run: Run) -> Params:
    """Maximum likelihood of the texts."""
    texts, size = vocabulary.texts, 64
    in_epoch = len(texts.tokens) // size
    num_updates = args.epochs * in_epoch
    schedule = optax.cosine_decay_schedule(5e-3, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    update = sft.make_step(machine.model, optimizer)

    def epoch(number: int, start: int) -> Iterator[Padded]:
        order = np.random.default_rng([args.seed, 2, number]).permutation(len(texts.tokens))
        for i in range(start, in_epoch):
            rows = order[i * size : (i + 1) * size]
            yield Padded(texts.tokens[rows], texts.mask[rows])

    def step(state: sft.TrainState, rows: Padded) -> tuple[sft.TrainState, Any]:
        tokens, mask = sharding.rows(rows, run.mesh)
        return update(state, tokens, mask, mask)

    return run.train(
        "sft", lambda key: sft.init(machine.model.init(key), optimizer), key,
        step=step, batches=partial(batches_from, epoch=epoch), num_steps=num_updates,
        save_every=1000, show={"loss": "loss"},
    ).state.params  # fmt: skip


def story(args: Args, texts: list[LabelledText], run: Run, clock: Clock) -> dict[str, Any]:
    """From texts to a policy for everybody."""
    keys = [sharding.put(key, run.mesh) for key in jax.random.split(jax.random.key(args.seed), 8)]
    vocabulary = Vocabulary(texts, args)
    tables, told = draw_tastes(vocabulary, args)
    machine = Machine(len(vocabulary.words), args)
    rounds = {
        "batches": partial(batches_from, epoch=lambda _, start: [None][start:]),
        "save_every": 1,
        "show": {"score": "objective/scores", "kl": "objective/kl"},
    }
    with clock("sft"):
        base = train_sft(args, machine, vocabulary, keys[0], run)

    # 1. In units of the language model's own texts, a person's taste has variance 1.
    shapes = jax.eval_shape(machine.adapters, base, keys[0])
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    each_key = jax.random.split(keys[1], 6)
    first = [jax.device_get(machine.judged(base, nothing, key)[0]) for key in each_key]
    first = jax.tree.map(lambda *x: np.concatenate(x), *first)
    tables /= np.maximum(worth(tables, first).std(1, keepdims=True), 1e-6)
    tables_there = sharding.put(tables, run.mesh)
    begun, pool, held = (jax.tree.map(lambda x, i=i: np.split(x, 3)[i], first) for i in range(3))

    # 2. What most like.
    def for_all(stage: str, pairs: Any, key: Array, nats: float, num_steps: int) -> Shared:
        return run.train(
            stage, machine.begin_shared, base, first, pairs, key,
            step=lambda state, _: machine.step_of_shared(state, base, nats),
            num_steps=num_steps, **rounds,
        ).state  # fmt: skip

    with clock("shared"):
        pairs = machine.first_round(tables_there, begun, keys[2])
        shared = for_all("shared", pairs, keys[3], 0.0, args.rounds)

    # 3. What each likes: the state of all is one tree, and one checkpoint.
    with clock("people"):
        trained = run.train(
            "people", machine.begin_people, base, shared, pairs, keys[4],
            step=lambda state, _: machine.step_of_people(state, tables_there, base, shared.head),
            num_steps=args.rounds - 1, **rounds,
        )  # fmt: skip
    everybody = trained.state

    # 4. What most like again, of all that was said, with as many updates and nats as each had.
    with clock("pooled"):
        nats, updates = trained.rows[-1]["objective/kl_of_middle"], 2 * args.rounds - 1
        pooled = for_all("pooled", everybody.pairs, keys[5], nats, updates)

    with clock("judging"):
        each = np.arange(args.people)
        *common, own = jax.device_get([x.policy.params for x in (shared, pooled, everybody)])
        policies = [nothing, *common, *(jax.tree.map(lambda x, i=i: x[i], own) for i in each)]
        judged = []
        for policy, key in zip(policies, jax.random.split(keys[6], len(policies)), strict=True):
            samples, nats = jax.device_get(machine.judged(base, policy, key))
            judged.append((samples.responses[: args.people], worth(tables, samples), nats))
        responses, worths, nats = (np.array(x) for x in zip(*judged, strict=True))
        worths = worths.astype(np.float64) - worths[0].mean(1)[:, None]
    with clock("study"):
        accuracy = machine.study(base, shared, tables_there, pool, held, keys[7])
        active, random = np.asarray(accuracy, np.float64).mean(0)
    asked = args.step * np.arange(1, len(random) + 1)
    summary: dict[str, Any] = {
        **figures(worths, nats.astype(np.float64), told),
        "choice/comparisons": asked.tolist(),
        "choice/accuracy_active": active.tolist(),
        "choice/accuracy_random": random.tolist(),
        "choice/share_of_comparisons": share_of_comparisons(asked, active, random),
        "compilations_after_first_round": trained.recompilations,
        "data/texts": len(vocabulary.texts.tokens),
        "data/words": len(vocabulary.words) - len(SPECIAL),
        "data/rare": vocabulary.counts[:, RARE].sum() / vocabulary.counts.sum(),
    }
    if args.timed:
        with clock("timing"):
            summary |= timing(machine, everybody, tables, (base, shared.head), args.timed)
    summary |= {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}
    summary |= {"seconds/total": clock.total(), "device": jax.devices()[0].device_kind}
    picture(summary, run.out / "people.png")
    # Of person i the text i: the shared policy's are the same for all.
    before, after = worths[1][each, each], worths[3:][each, each, each]
    write_samples(
        run.out / "samples.md",
        [f"{i + 1}: {taste}" for i, taste in enumerate(told)],
        vocabulary.decode(responses[1]),
        vocabulary.decode(responses[3:][each, each]),
        scores_before=before,
        scores_after=after,
        gold_before=before > 0,
        gold_after=after > 0,
    )
    run.write("summary.json", summary)
    return summary


def figures(worths: np.ndarray, nats: np.ndarray, told: list[str]) -> dict[str, Any]:
    """What people think of policies.

    Args:
      worths: [3 + N, N, texts] of texts to people: the language model's, those of the two policies
        for all, and those of everybody's own.
      nats: [3 + N], divergences of these policies.
      told: [N], the tastes.
    """
    common, cross = np.split(worths.mean(2)[1:], [2])
    own, variance = cross.diagonal(), worths.var(2) / worths.shape[2]
    ranks = 1 + (cross > own).sum(0)
    columns = {"taste": told, "own": own, "kl": nats[3:], "rank_of_own": ranks.tolist()}
    found: dict[str, Any] = {}
    for place, (name, rival) in enumerate(zip(("shared", "pooled"), common, strict=True), 1):
        gain, error = own - rival, np.sqrt(variance[3:].diagonal() + variance[place])
        columns |= {name: rival, f"gain_over_{name}": gain, f"error_of_gain_over_{name}": error}
        found |= {
            f"people/better_off_than_{name}": int((gain > 0).sum()),
            f"people/better_off_than_{name}_by_two_errors": int((gain > 2 * error).sum()),
            f"people/mean_gain_over_{name}": gain.mean(),
            f"{name}/kl": nats[place],
        }
    rows = zip(*columns.values(), strict=True)
    return found | {
        "people/mean_kl": nats[3:].mean(),
        "people/median_kl": float(np.median(nats[3:])),
        "people/own_is_best": int((ranks == 1).sum()),
        "people/mean_rank_of_own": ranks.mean(),
        "people": [dict(zip(columns, row, strict=True)) for row in rows],
        "policies_by_tastes": cross.tolist(),
    }


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
    machine: Machine, everybody: Own, tables: np.ndarray, common: tuple[Params, Params], rounds: int
) -> dict[str, float]:
    """Seconds of a round of all, and of one on all devices and on one: the fastest, in turns."""
    one = jax.tree.map(lambda x: x[:1], (everybody, tables))
    cases = {
        "all": (sharding.mesh(), (everybody, tables)),
        "one": (sharding.mesh(), one),
        "one_on_one_device": (sharding.mesh(devices=jax.devices()[:1]), one),
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):  # the first one compiles
        for name, (mesh, case) in cases.items():
            with jax.set_mesh(mesh):
                state, *rest = jax.block_until_ready(sharding.put((*case, *common), mesh))
                start = time.perf_counter()
                jax.block_until_ready(machine.step_of_people(state, *rest))
                taken[name].append(time.perf_counter() - start)
    fastest = {name: min(seconds[1:]) for name, seconds in taken.items()}
    ratio = fastest["all"] / min(fastest["one"], fastest["one_on_one_device"])
    return {f"seconds/round_of_{name}": x for name, x in fastest.items()} | {"seconds/ratio": ratio}


def picture(summary: dict[str, Any], path: Path) -> None:
    """Accuracy over comparisons, what each gains, and what people think of each other's texts."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.1))
        titles = ("Choosing what to ask", "What each gains", "Whose texts who likes")
        for axes, title in zip((left, middle, right), titles, strict=True):
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        for name, colour in (("active", plots.BLUE), ("random", plots.ORANGE)):
            accuracy = summary[f"choice/accuracy_{name}"]
            left.plot(summary["choice/comparisons"], accuracy, color=colour, label=f"{name} pairs")
        best = max(summary["choice/accuracy_random"])
        left.axhline(best, color=plots.FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        left.set_xlabel("comparisons of each person")
        left.set_ylabel("accuracy on held-out pairs")
        left.legend(frameon=False, loc="lower right")
        persons = summary["people"]
        places = np.arange(1, len(persons) + 1)
        shown = (
            ("own", "own policy", plots.BLUE, "o"),
            ("shared", "where all began", plots.ORANGE, "o"),
            ("pooled", "pooled", plots.GREEN, "D"),
        )
        columns = {name: np.array([x[name] for x in persons]) for name, *_ in shown}
        ends = (f(list(columns.values()), axis=0) for f in (np.min, np.max))
        middle.vlines(places, *ends, color=plots.FAINT, linewidth=1, zorder=0)
        for name, label, colour, marker in shown:
            middle.plot(places, columns[name], marker, markersize=4, color=colour, label=label)
        middle.axhline(0, color=plots.FAINT, linewidth=0.8, zorder=0)
        middle.set_xticks(places)
        middle.set_xlabel("person")
        middle.set_ylabel("worth to them, sd of the first texts")
        middle.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1, fontsize=8)
        middle.margins(y=0.15)
        # Columns are people, rows the policies of people; those of one main aspect side by side.
        order = np.argsort((places - 1) % len(ASPECTS), kind="stable")
        table = np.array(summary["policies_by_tastes"])[np.ix_(order, order)]
        most = np.abs(table).max()
        drawn = right.imshow(table, cmap="PuOr", vmin=-most, vmax=most)
        right.set_xticks(range(len(order)), places[order], fontsize=6)
        right.set_yticks(range(len(order)), places[order], fontsize=6)
        right.set_xlabel("to person")
        right.set_ylabel("policy of person")
        figure.colorbar(drawn, ax=right, label="worth")
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    # A device a core: XLA does not share out operations as small as these among threads.
    of_process = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    jax.config.update("jax_num_cpu_devices", len(of_process(0)))
    print(json.dumps(main(tyro.cli(Args)), indent=2))
