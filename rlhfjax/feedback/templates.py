r"""Texts with blanks, as tokens: read once in Python, filled in the graph.

A text such as `"{prompt}\nReply: {response}\nIs it kind? Answer:"` becomes the tokens of what
stands between its blanks. `fill` puts tokens into the blanks of a whole batch, inside a compiled
step, so that a judge reads what a policy has just sampled. Each part has the tokens that it has on
its own; a tokenizer that merges across parts would give others for the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import sequences
from rlhfjax.data.batches import right_pad
from rlhfjax.data.text import DataError
from rlhfjax.types import Rollout

PLACEHOLDERS = ("prompt", "response", "first", "second", "critique")
Field = tuple[Array, Array]
"""What goes into a blank: tokens [B, L] int32 and their mask [B, L] bool, padded anywhere."""


class Vocabulary(NamedTuple):
    """How a model reads text.

    Attributes:
      encode: a text to tokens, without what a tokenizer puts around whole texts.
      size: V; tokens are 0 to V - 1.
      begin: what every text begins with, such as a begin token.
      unknown: tokens that stand for what the vocabulary lacks.
    """

    encode: Callable[[str], Sequence[int]]
    size: int
    begin: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()


class _Tokenizer(Protocol):
    """The part of `pretrained.Tokenizer` that is asked for here."""

    @property
    def backend(self) -> Any: ...
    @property
    def begin_token(self) -> int | None: ...
    @property
    def special_tokens(self) -> Mapping[str, str]: ...


def vocabulary(tokenizer: _Tokenizer, *, size: int) -> Vocabulary:
    """The vocabulary of a model directory's tokenizer.

    Args:
      tokenizer: a `pretrained.Tokenizer`.
      size: the model's `vocab_size`: a tokenizer may have more tokens than the model knows, or
        fewer.

    Returns:
      a `Vocabulary` whose texts begin as the tokenizer's do, and whose `encode` raises a ValueError
      where the tokenizer drops a character.
    """
    backend = tokenizer.backend

    def encode(text: str) -> list[int]:
        encoding = backend.encode(text, add_special_tokens=False)
        read = {at for start, end in encoding.offsets for at in range(start, end)}
        # What a model without an unknown token lacks has no token at all. Normalizers take out
        # spaces and invisible characters on purpose.
        if any(
            character.isprintable() and not character.isspace() and at not in read
            for at, character in enumerate(text)
        ):
            raise ValueError(f"characters have no token, and what is left is {encoding.tokens}")
        return encoding.ids

    # A model may use an unknown token that its directory does not name.
    names = {tokenizer.special_tokens.get("unk_token"), getattr(backend.model, "unk_token", None)}
    unknown = {backend.token_to_id(name) for name in names if name is not None}
    return Vocabulary(
        encode,
        size,
        () if tokenizer.begin_token is None else (tokenizer.begin_token,),
        tuple(sorted(token for token in unknown if token is not None)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Template:
    """A text with N blanks, as tokens; small, and a tree of arrays like any other.

    Attributes:
      pieces: N + 1 of [L] int32, before, between and behind the blanks; or [B, L], a text of its
        own for each row, see `select`.
      masks: of each piece, its shape, bool.
      names: N, what goes into the blanks; static.
    """

    pieces: tuple[Any, ...]
    masks: tuple[Any, ...]
    names: tuple[str, ...] = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Question:
    """A text with blanks, and the K answers that are expected behind it.

    Attributes:
      template: the text.
      answers: [K, A] int32, right-padded; or [B, K, A], see `select_question`.
      mask: its shape, bool.
    """

    template: Template
    answers: Any
    mask: Any


def parse(
    text: str, *, needed: Iterable[str] = (), known: Iterable[str] = PLACEHOLDERS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands around the placeholders of a text, and their names; `{{` and `}}` are braces.

    Args:
      text: with placeholders such as `{response}`.
      needed: placeholders that it must have.
      known: those that it may have.

    Returns:
      N + 1 texts, and N names in their order; a name may occur more than once.

    Raises:
      DataError: a brace by itself, a placeholder that is not known, one that is missing, or none.
    """
    known, pieces, names = tuple(known), [""], []
    try:
        for literal, name, spec, conversion in Formatter().parse(text):
            pieces[-1] += literal
            if name is None:
                continue
            if name not in known or spec or conversion:
                there = ", ".join(f"{{{one}}}" for one in known)
                raise DataError(
                    f"{{{name}}} in {text!r:.80} is none of the placeholders {there}; write {{{{ "
                    "and }} for braces"
                )
            names.append(name)
            pieces.append("")
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{text!r:.80}: {error}; write {{{{ and }}}} for braces") from None
    for name in needed:
        if name not in names:
            raise DataError(f"{text!r:.80} has no placeholder {{{name}}}: put it where that goes")
    if not names:
        raise DataError(f"{text!r:.80} has no placeholder")
    return tuple(pieces), tuple(names)


def encode(
    text: str,
    vocabulary: Vocabulary,
    *,
    needed: Iterable[str] = (),
    known: Iterable[str] = PLACEHOLDERS,
) -> Template:
    """A text with placeholders as tokens.

    Args:
      text: as for `parse`.
      vocabulary: of the model that is to read it.
      needed: placeholders that it must have.
      known: those that it may have.

    Returns:
      a `Template` of NumPy arrays.

    Raises:
      DataError: as `parse`, or a token that is not in the vocabulary.
    """
    texts, names = parse(text, needed=needed, known=known)
    if unknown := [token for token in vocabulary.begin if not 0 <= token < vocabulary.size]:
        raise DataError(f"texts begin with the token {unknown[0]}, which is unknown to the model")
    ids = [tokens_of(piece, vocabulary) if piece else [] for piece in texts]
    ids[0] = [*vocabulary.begin, *ids[0]]
    pieces = tuple(np.asarray(piece, np.int32) for piece in ids)
    return Template(pieces, tuple(np.ones(piece.shape, bool) for piece in pieces), names)


def encode_answers(answers: Sequence[str], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Answers as tokens.

    Answers of one token each are read together. Where they share a beginning, such as a token for
    the space before them, it changes nothing between them, and is better put at the end of the
    question.

    Args:
      answers: K texts, with the white space that stands before them.
      vocabulary: of the judge.

    Returns:
      tokens [K, A] int32, right-padded, and mask [K, A] bool.

    Raises:
      DataError: an answer without a token or with one that the vocabulary lacks, or one that is the
        beginning of another, which would always be the less probable of the two.
    """
    rows: list[list[int]] = []
    for answer in answers:
        ids = tokens_of(answer, vocabulary)
        if not ids:
            raise DataError(f"the answer {answer!r} has no token in the judge's vocabulary")
        for other, before in zip(answers, rows, strict=False):
            shared = min(len(before), len(ids))
            if before[:shared] == ids[:shared]:
                raise DataError(
                    f"the answers {other!r} and {answer!r} are the tokens {before} and {ids}, of "
                    "which one begins with the other: choose answers that differ"
                )
        rows.append(ids)
    longest = max(map(len, rows))
    tokens, mask = right_pad(rows, num_rows=len(rows), length=longest, pad_token=0)
    return tokens, mask


def tokens_of(text: str, vocabulary: Vocabulary) -> list[int]:
    """The tokens of a text, all of them known.

    Args:
      text: any.
      vocabulary: of the model that is to read it.

    Returns:
      its ids.

    Raises:
      DataError: the text cannot be encoded, or the vocabulary lacks a part of it.
    """
    try:
        ids = [int(token) for token in vocabulary.encode(text)]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"the vocabulary lacks {text!r:.80}: {error!r}") from error
    for token in ids:
        if token in vocabulary.unknown or not 0 <= token < vocabulary.size:
            raise DataError(
                f"the vocabulary lacks a part of {text!r:.80}: its tokens are {ids}, of which "
                f"{token} is unknown to the model"
            )
    return ids


def fill(template: Template, fields: Mapping[str, Field], *, pad_token: int = 0) -> Field:
    """The text with its blanks filled, left-padded: ready to be continued or answered.

    Args:
      template: the text.
      fields: placeholder → tokens [B, L] and mask [B, L]; those that the text lacks are not used.
      pad_token: what stands under the mask.

    Returns:
      tokens [B, S] int32 and mask [B, S] bool, S = Σ L over pieces and blanks. Nothing under a mask
      reaches the result.

    Raises:
      ValueError: a placeholder for which there is no field.
      AssertionError: tokens and mask of a field do not go together, or the rows of two fields.
    """
    if missing := [name for name in template.names if name not in fields]:
        raise ValueError(
            f"nothing is given for {{{missing[0]}}}, only for {', '.join(sorted(fields)) or 'none'}"
        )
    blanks = [fields[name] for name in template.names]
    for tokens, mask in blanks:
        chex.assert_rank([tokens, mask], 2)
        chex.assert_equal_shape([tokens, mask])
        chex.assert_type([tokens, mask], [int, bool])
    chex.assert_equal_shape([mask for _, mask in blanks], dims=0)
    num_rows = len(blanks[0][0])
    parts = [piece for pair in zip(_pieces(template), [*blanks, ()], strict=True) for piece in pair]
    rows = [[jnp.broadcast_to(x, (num_rows, x.shape[-1])) for x in part] for part in parts if part]
    tokens, mask = (jnp.concatenate(side, axis=1) for side in zip(*rows, strict=True))
    return sequences.pad_left(tokens.astype(jnp.int32), mask, pad_value=pad_token)


def _pieces(template: Template) -> list[Field]:
    return [
        (jnp.asarray(tokens), jnp.asarray(mask))
        for tokens, mask in zip(template.pieces, template.masks, strict=True)
    ]


def fields_of(samples: Rollout, *, drop: Sequence[int]) -> dict[str, Field]:
    """Prompts and responses of a rollout, for the blanks `{prompt}` and `{response}`.

    A response is what its mask says. Of episodes of several turns that would be the policy's turns
    without the observations between them: give `Episodes.with_observations`.

    Args:
      samples: of a policy with the judge's vocabulary.
      drop: tokens that have no place within a text, such as those that begin and end one; () where
        there are none.

    Returns:
      `prompt` and `response`.
    """
    num_tokens = samples.response_mask.shape[1]
    prompts = samples.prompts, samples.attention_mask[:, :-num_tokens]
    return {
        "prompt": without(prompts, drop),
        "response": without((samples.responses, samples.response_mask), drop),
    }


def without(text: Field, drop: Sequence[int] | Array) -> Field:
    """A field in which some tokens are padding.

    Args:
      text: tokens and mask.
      drop: the tokens.

    Returns:
      tokens and mask.
    """
    tokens, mask = text
    return tokens, mask & ~jnp.isin(tokens, jnp.asarray(drop, jnp.int32))


def select(templates: Sequence[Template], index: Array) -> Template:
    """For each row one of several texts, such as that of the principle drawn for it.

    Args:
      templates: K texts with the same placeholders in the same order.
      index: [B] int, 0 to K - 1.

    Returns:
      a `Template` of pieces [B, L], L the longest of each place.

    Raises:
      ValueError: their placeholders differ.
    """
    if len({template.names for template in templates}) > 1:
        told = "; ".join(" ".join(f"{{{n}}}" for n in each.names) for each in templates)
        raise ValueError(f"texts of which one is drawn need the same placeholders in order: {told}")
    stacked = [_stacked(at) for at in zip(*(each.pieces for each in templates), strict=True)]
    masks = [_stacked(at) for at in zip(*(each.masks for each in templates), strict=True)]
    return Template(
        tuple(piece[index] for piece in stacked),
        tuple(mask[index] for mask in masks),
        templates[0].names,
    )


def select_question(questions: Sequence[Question], index: Array) -> Question:
    """`select` of questions with their answers.

    Args:
      questions: K of them, with the same placeholders in the same order and as many answers.
      index: [B] int, 0 to K - 1.

    Returns:
      a `Question` with answers [B, N, A].

    Raises:
      ValueError: their placeholders differ, or how many answers they have.
    """
    if len({len(question.answers) for question in questions}) > 1:
        raise ValueError("questions of which one is drawn need the same number of answers")
    answers = _stacked([question.answers for question in questions])
    mask = _stacked([question.mask for question in questions])
    template = select([question.template for question in questions], index)
    return Question(template, answers[index], mask[index])


def _stacked(arrays: Sequence[Any]) -> Array:
    """Arrays that differ in their last axis only, one behind the other, zeros where they end."""
    width = max(x.shape[-1] for x in arrays)
    return jnp.stack(
        [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in arrays]
    )
