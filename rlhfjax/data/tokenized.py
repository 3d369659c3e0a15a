"""Examples to token ids.

`responses` tokenises prompts with whatever responses an example has, `supervised` the texts to be
learned.  Strings are encoded with the tokenizer's special tokens, such as one that begins texts,
and end with its end token; conversations with what the chat template writes and nothing else.

A prompt has the tokens that it has on its own, which are those that responses will be sampled to.
Where the tokens of prompt and response together begin with them, a response is the others, as in
TRL.  Where they do not, because something merges across the boundary, the response is encoded by
itself; TRL would drop the end of the prompt there, and train on a context that never occurs again.
Where a chat template writes a prompt in another way once an answer follows, the prompt ends where
the two texts differ, as in TRL.  `Report.boundaries` counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from rlhfjax.data.chat import ChatTemplate
from rlhfjax.data.formats import Completion, Content, Prompt, Text, common_prefix
from rlhfjax.data.records import NUM_TOLD, BadRecords, Place
from rlhfjax.data.text import DataError

Ids = list[int]
Shorten = Callable[[list[Any], int], list[Any]]
T = TypeVar("T")


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """After which a text is over; the first is put there."""

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Ids]:
        """The ids of texts, with or without what the tokenizer puts around them."""


def keep_start(tokens: list[T], length: int) -> list[T]:
    """The first tokens of those that are too many.

    Args:
      tokens: anything a token has.
      length: how many there may be.

    Returns:
      as many.
    """
    return tokens[:length]


def keep_end(tokens: list[T], length: int) -> list[T]:
    """The last tokens of those that are too many.

    Args:
      tokens: anything a token has.
      length: how many there may be.

    Returns:
      as many.
    """
    return tokens[len(tokens) - length :]


def leave_out(tokens: list[T], length: int) -> list[T]:
    """Nothing of tokens that are too many; their record is left out.

    Args:
      tokens: anything a token has.
      length: how many there may be.

    Returns:
      nothing.
    """
    return tokens[:0]


@dataclass
class Report:
    """What became of the examples.

    Attributes:
      num_examples: those that there were.
      shortened: places of those that lost tokens.
      left_out: places of those of which nothing was left to learn.
      unlearned: places of those in which nothing was to be learned, however long.
      boundaries: places of those whose prompt and response together have other tokens than the two
        have alone.
      bad: the records that cannot be tokenised at all.
    """

    bad: BadRecords
    num_examples: int = 0
    shortened: list[Place] = field(default_factory=list)
    left_out: list[Place] = field(default_factory=list)
    unlearned: list[Place] = field(default_factory=list)
    boundaries: list[Place] = field(default_factory=list)

    def __str__(self) -> str:
        told = [f"{self.num_examples} examples"]
        for what, places in (
            ("shortened", self.shortened),
            ("left out as too long or empty", self.left_out),
            ("left out without anything to learn, such as a turn of the assistant", self.unlearned),
            ("with other tokens where the response begins", self.boundaries),
        ):
            if places:
                first = ", ".join(map(str, places[:NUM_TOLD]))
                told.append(f"{len(places)} {what}: {first}{', …' * (len(places) > NUM_TOLD)}")
        return "\n  ".join([*told, *([str(self.bad)] if self.bad.found else [])])


class Tokenized(NamedTuple):
    """An example in token ids.

    Attributes:
      example: what it was.
      prompt: its prompt.
      responses: each of its responses; none of a `Prompt`.
    """

    example: Any
    prompt: Ids
    responses: tuple[Ids, ...]

    @property
    def num_tokens(self) -> int:
        """Of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses), default=0)


class Learned(NamedTuple):
    """A text in token ids.

    Attributes:
      tokens: its ids.
      learned: of each whether it is to be learned.
    """

    tokens: Ids
    learned: list[bool]


def responses(
    examples: Iterable[Prompt],
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    max_prompt_length: int | None = None,
    long_prompt: Shorten = keep_end,
    max_length: int | None = None,
    multiple: int = 1,
    long_response: Shorten = keep_start,
    may_lack_prompt: bool = False,
    bad: BadRecords | None = None,
) -> tuple[list[Tokenized], Report]:
    """Prompts and responses as token ids.

    Args:
      examples: of any format with prompts.
      tokenizer: of the model.
      template: of the model; needed for conversations.
      max_prompt_length: of a prompt in tokens.
      long_prompt: what becomes of a longer one: `keep_end` or `leave_out`.
      max_length: of a prompt with a response in tokens.
      multiple: for `max_length` a prompt counts as rounded up to it. Examples of just that length
        would otherwise need one shape of batches for each length of their prompts, see
        `example_batches.shapes`.
      long_response: what becomes of responses where they are too long: `keep_start` (TRL's direct
        methods) or `leave_out` (TRL's reward models).
      may_lack_prompt: a response needs no token before it, as where it is judged and not learned.
      bad: takes the conversations that the template refuses; by default the first ones are refused.

    Returns:
      The examples that have something left of each part, and what became of the others.

    Raises:
      DataError: too many bad records, nothing that is left, or no template for conversations.
    """
    report, found = Report(BadRecords() if bad is None else bad), []
    for example in examples:
        report.num_examples += 1
        place = example.place or Place("example", report.num_examples)
        try:
            prompt, given, apart = _split(example, tokenizer, template)
        except DataError as error:
            report.bad.add(place, str(error))
            continue
        if apart:
            report.boundaries.append(place)
        start = _shortened(prompt, max_prompt_length, long_prompt)
        taken = -(-len(start) // multiple) * multiple
        room = None if max_length is None else max(max_length - taken, 0)
        ends = tuple(_shortened(response, room, long_response) for response in given)
        needed = ends if may_lack_prompt and not prompt else (start, *ends)
        if room == 0 or not all(needed):
            report.left_out.append(place)
            continue
        if (start, ends) != (prompt, given):
            report.shortened.append(place)
        found.append(Tokenized(example, start, ends))
    return _checked(found, report)


def supervised(
    examples: Iterable[Text | Completion],
    tokenizer: Tokenizer,
    *,
    learn: Callable[[Any, Tokenizer, ChatTemplate | None], tuple[Learned, bool]],
    template: ChatTemplate | None = None,
    max_length: int | None = None,
    long_text: Shorten = keep_start,
    bad: BadRecords | None = None,
) -> tuple[list[Learned], Report]:
    """Texts to be learned as token ids.

    Args:
      examples: texts, conversations, prompts with completions.
      tokenizer: of the model.
      learn: which tokens: `every_token`, `completion_tokens` or `assistant_tokens`.
      template: of the model; needed for conversations.
      max_length: of a text in tokens.
      long_text: what becomes of longer ones: `keep_start`, `keep_end` or `leave_out`.
      bad: takes what `learn` and the template refuse; by default the first ones are refused.

    Returns:
      The texts in which anything is left to be learned, and what became of the others.

    Raises:
      DataError: too many bad records, nothing that is left, or no template for conversations.
    """
    report, found = Report(BadRecords() if bad is None else bad), []
    for example in examples:
        report.num_examples += 1
        place = example.place or Place("example", report.num_examples)
        try:
            whole, apart = learn(example, tokenizer, template)
        except DataError as error:
            report.bad.add(place, str(error))
            continue
        if apart:
            report.boundaries.append(place)
        text = Learned(
            _shortened(whole.tokens, max_length, long_text),
            _shortened(whole.learned, max_length, long_text),
        )
        # The first token is predicted from nothing.
        if not any(text.learned[1:]):
            nothing = whole.tokens[1:] and not any(whole.learned[1:])
            (report.unlearned if nothing else report.left_out).append(place)
            continue
        if len(text.tokens) < len(whole.tokens):
            report.shortened.append(place)
        found.append(text)
    return _checked(found, report)


def every_token(
    example: Text | Completion, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Learned, bool]:
    """All that is written, prompts too: for `supervised`.

    Args:
      example: any.
      tokenizer: of the model.
      template: of the model.

    Returns:
      The text, and whether its prompt ends elsewhere than in tokens.
    """
    if isinstance(example, Completion):
        learned, apart = completion_tokens(example, tokenizer, template)
        return learned._replace(learned=[True] * len(learned.tokens)), apart
    plain = isinstance(example.text, str)
    (tokens,) = tokenizer.encode([_written(example.text, template)], add_special_tokens=plain)
    tokens = _ended(tokens, tokenizer) if plain else tokens
    return Learned(tokens, [True] * len(tokens)), False


def completion_tokens(
    example: Text | Completion, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Learned, bool]:
    """The completions alone: for `supervised`.

    Args:
      example: with a completion.
      tokenizer: of the model.
      template: of the model.

    Returns:
      The text, and whether its prompt ends elsewhere than in tokens.

    Raises:
      DataError: a text without a prompt.
    """
    if not isinstance(example, Completion):
        raise DataError("a text has no completion; learn every token, or the assistant's")
    prompt, (response,), apart = _split(example, tokenizer, template)
    learned = [False] * len(prompt) + [True] * len(response)
    return Learned([*prompt, *response], learned), apart


def assistant_tokens(
    example: Text | Completion, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Learned, bool]:
    """What the assistant says in any of its turns: for `supervised`.

    Args:
      example: a conversation.
      tokenizer: of the model.
      template: of the model.

    Returns:
      The text, and False.

    Raises:
      DataError: a string, or a template that does not tell who wrote what.
    """
    messages = (
        example.text if isinstance(example, Text) else _joined(example.prompt, example.completion)
    )
    if isinstance(messages, str):
        raise DataError("a string has no turns of an assistant; learn every token")
    text, spans = _needed(template).assistant_spans(messages)
    # A token is behind a place if the text up to there does not begin with it.
    beginnings = [text[:place] for span in spans for place in span]
    tokens, *before = tokenizer.encode([text, *beginnings], add_special_tokens=False)
    places = [common_prefix(tokens, start) for start in before]
    learned = [False] * len(tokens)
    for begin, end in zip(places[::2], places[1::2], strict=True):
        learned[begin:end] = [True] * (end - begin)
    return Learned(tokens, learned), False


def _split(
    example: Prompt, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Ids, tuple[Ids, ...], bool]:
    """Tokens of the prompt and of each response, and whether they differ from those of both."""
    prompt = _opened(example.prompt, template)
    wholes = [_written(_joined(example.prompt, r), template) for r in example.responses]
    shared = prompt[: common_prefix(prompt, *wholes)]
    plain = isinstance(example.prompt, str)
    start, *both = tokenizer.encode([shared, *wholes], add_special_tokens=plain)
    found, apart = [], shared != prompt
    for whole, tokens in zip(wholes, both, strict=True):
        if tokens[: len(start)] == start:
            rest = tokens[len(start) :]
        else:
            apart = True
            (rest,) = tokenizer.encode([whole[len(shared) :]], add_special_tokens=False)
        found.append(_ended(rest, tokenizer) if plain else rest)
    return start, tuple(found), apart


def _joined(prompt: Content, response: Content) -> Content:
    return [*prompt, *response] if isinstance(prompt, list) else f"{prompt}{response}"


def _written(content: Content, template: ChatTemplate | None) -> str:
    return content if isinstance(content, str) else _needed(template).render(content)


def _opened(prompt: Content, template: ChatTemplate | None) -> str:
    """The text of a prompt that is to be answered, or gone on with if the assistant has begun."""
    if isinstance(prompt, str):
        return prompt
    begun = bool(prompt) and prompt[-1]["role"] == "assistant"
    return _needed(template).render(
        prompt, add_generation_prompt=not begun, continue_final_message=begun
    )


def _needed(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise DataError("a conversation needs a chat template; give one, such as chat.CHATML")
    return template


def _ended(tokens: Ids, tokenizer: Tokenizer) -> Ids:
    ends = tokenizer.end_tokens
    return tokens if not ends or tokens[-1:] == [ends[0]] else [*tokens, ends[0]]


def _shortened(tokens: list[T], length: int | None, shorten: Shorten) -> list[T]:
    return tokens if length is None or len(tokens) <= length else shorten(tokens, length)


def _checked(found: list[Any], report: Report) -> tuple[list[Any], Report]:
    report.bad.check()
    if not found:
        raise DataError(f"nothing is left of {report}")
    return found, report
