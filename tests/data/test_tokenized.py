"""Examples to tokens: what each begins and ends with, where responses begin, what is left out."""

from collections.abc import Sequence

import pytest

from rlhfjax.data import tokenized
from rlhfjax.data.chat import ChatTemplate
from rlhfjax.data.formats import Completion, Pair, Prompt, Ranking, Rating, Text
from rlhfjax.data.records import BadRecords, Place
from rlhfjax.data.text import DataError
from rlhfjax.data.tokenized import (
    assistant_tokens,
    completion_tokens,
    every_token,
    keep_end,
    leave_out,
)

BEGIN, END, MERGED = 1, 2, 3


class Letters:
    """A letter is a token, but ": " with what follows it is one; a text begins with BEGIN."""

    end_tokens = (END, 99)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [[BEGIN] * add_special_tokens + self._letters(text) for text in texts]

    def _letters(self, text: str) -> list[int]:
        if not text:
            return []
        if text[0] == ":" and len(text) > 1:
            return [MERGED * ord(text[1]), *self._letters(text[2:])]
        return [END if text[0] == "$" else ord(text[0]), *self._letters(text[1:])]


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


TOKENIZER = Letters()
TAGGED = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
    "{% else %}{{ m.content }}.{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
UNTAGGED = ChatTemplate(
    TAGGED.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


CHAT = [message("user", "Q"), message("assistant", "x"), message("user", "R")]


def one(example, **options):
    (found,), report = tokenized.responses([example], TOKENIZER, **options)
    return found.prompt, list(found.responses), report


class TestResponses:
    def test_strings_begin_and_end_with_special_tokens(self) -> None:
        prompt, responses, _ = one(Pair(prompt="ab", chosen="cd", rejected=""))
        assert prompt == [BEGIN, *ids("ab")]
        assert responses == [[*ids("cd"), END], [END]]

    def test_an_end_that_is_there_is_not_added(self) -> None:
        assert one(Completion(prompt="ab", completion="c$"))[1] == [[ord("c"), END]]

    def test_conversations_have_what_the_template_writes(self) -> None:
        example = Pair(
            prompt=CHAT,
            chosen=[message("assistant", "y")],
            rejected=[message("assistant", "zz")],
        )
        prompt, responses, _ = one(example, template=TAGGED)
        assert prompt == ids("uQ.ax.uR.a")
        assert responses == [ids("y."), ids("zz.")]

    def test_prompts_alone_are_opened_for_an_answer_or_gone_on_with(self) -> None:
        assert one(Prompt(prompt="ab"))[:2] == ([BEGIN, *ids("ab")], [])
        assert one(Prompt(prompt=CHAT), template=TAGGED)[0] == ids("uQ.ax.uR.a")
        assert one(Prompt(prompt=CHAT[:2]), template=TAGGED)[0] == ids("uQ.ax")

    def test_a_prompt_has_the_tokens_it_has_alone_where_the_boundary_merges(self) -> None:
        example = Pair(prompt="a:", chosen="bc", rejected="d", place=Place("f", 7))
        # Together they would be a, the merged token of b, c: the prompt would lose its end.
        assert TOKENIZER.encode(["a:bc"], add_special_tokens=False)[0][1] == MERGED * ord("b")
        prompt, responses, report = one(example)
        assert prompt == one(Prompt(prompt="a:"))[0] == [BEGIN, *ids("a:")]
        assert responses == [[*ids("bc"), END], [*ids("d"), END]]
        assert report.boundaries == [Place("f", 7)]
        assert one(Completion(prompt="a", completion=":bc"))[2].boundaries == []

    def test_a_prompt_that_is_written_otherwise_without_an_answer_ends_where_they_differ(
        self,
    ) -> None:
        thinking = ChatTemplate(TAGGED.source.replace("%}a{% endif", "%}a<t>{% endif"))
        example = Completion(prompt=CHAT, completion=[message("assistant", "y")])
        prompt, responses, report = one(example, template=thinking)
        assert (prompt, responses) == (ids("uQ.ax.uR.a"), [ids("y.")])
        assert len(report.boundaries) == 1

    def test_long_prompts_keep_their_end_and_long_responses_their_start(self) -> None:
        example = Pair(prompt="abcdef", chosen="ghijk", rejected="l", place=Place("f", 1))
        prompt, responses, report = one(example, max_prompt_length=3, max_length=5)
        assert prompt == ids("def")
        assert responses == [ids("gh"), [ord("l"), END]]
        assert report.shortened == [Place("f", 1)]
        assert "1 shortened: f:1" in str(report)

    @pytest.mark.parametrize(("multiple", "kept"), [(1, 9), (4, 8), (8, 4)])
    def test_a_prompt_may_count_as_rounded_up(self, multiple: int, kept: int) -> None:
        # A prompt of 3 with its begin, in 12 tokens.
        example = Completion(prompt="ab", completion="cdefghijkl")
        prompt, responses, _ = one(example, max_length=12, multiple=multiple)
        assert (prompt, responses) == ([BEGIN, *ids("ab")], [ids("cdefghijkl")[:kept]])

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"max_prompt_length": 4}, [1, 2, 3, 4]),
            ({"max_prompt_length": 4, "long_prompt": leave_out}, [1, 3, 4]),
            # A prompt that fills all of it leaves no room for a response.
            ({"max_length": 5}, [1, 3, 4]),
            ({"max_length": 5, "long_response": leave_out}, [1, 4]),
        ],
    )
    def test_what_is_left_out_is_told(self, options: dict, kept: list[int]) -> None:
        examples = [
            Completion(prompt=prompt, completion=completion, place=Place("f", line))
            for line, (prompt, completion) in enumerate(
                [("ab", "c"), ("abcde", "c"), ("a", "cdefgh"), ("a", "c")], start=1
            )
        ]
        found, report = tokenized.responses(examples, TOKENIZER, **options)
        assert [item.example.place.line for item in found] == kept
        assert [place.line for place in report.left_out] == [
            n for n in range(1, 5) if n not in kept
        ]
        assert report.num_examples == 4

    def test_a_prompt_without_a_token_is_left_out_unless_it_may_be_missing(self) -> None:
        class Beginless(Letters):
            def encode(self, texts, *, add_special_tokens):
                return super().encode(texts, add_special_tokens=False)

        examples = [Rating(prompt="", completion="c", label=1.0), Prompt(prompt="a")]
        (found,), report = tokenized.responses(examples, Beginless())
        assert (found.prompt, len(report.left_out)) == (ids("a"), 1)
        (found, _), report = tokenized.responses(examples, Beginless(), may_lack_prompt=True)
        assert (found.prompt, found.responses) == ([], ([ord("c"), END],))
        # One that is left out as too long is not one that is missing.
        left_out = {"max_prompt_length": 1, "long_prompt": leave_out, "may_lack_prompt": True}
        with pytest.raises(DataError, match="nothing is left of 1 examples"):
            tokenized.responses(
                [Rating(prompt="ab", completion="c", label=1.0)], TOKENIZER, **left_out
            )

    def test_every_response_of_a_ranking(self) -> None:
        ranking = Ranking(prompt="a", completions=("b", "cc", ""), ranks=(0, 1, 2))
        (item,), _ = tokenized.responses([ranking], TOKENIZER)
        assert item.responses == ([ord("b"), END], [*ids("cc"), END], [END])
        assert item.num_tokens == 2 + 3

    def test_what_a_template_refuses_is_a_bad_record(self) -> None:
        strict = ChatTemplate(
            "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}"
            "{% endif %}" + TAGGED.source
        )
        examples = [
            Prompt(prompt=messages, place=Place("f", line))
            for line, messages in enumerate([CHAT, CHAT[1:]], start=1)
        ]
        bad = BadRecords(1)
        found, report = tokenized.responses(examples, TOKENIZER, template=strict, bad=bad)
        assert len(found) == 1
        assert report.bad is bad
        assert bad.found == [(Place("f", 2), "chat template: TemplateError: begin with the user")]
        with pytest.raises(DataError, match="f:2: chat template"):
            tokenized.responses(examples, TOKENIZER, template=strict)

    def test_conversations_need_a_template(self) -> None:
        with pytest.raises(
            DataError, match=r"needs a chat template; give one, such as chat\.CHATML"
        ):
            one(Prompt(prompt=CHAT))


def learned(example, learn, **options) -> list[tuple[int, bool]]:
    (text,), _ = tokenized.supervised([example], TOKENIZER, learn=learn, **options)
    return list(zip(text.tokens, text.learned, strict=True))


def marked(text: str, marks: str) -> list[tuple[int, bool]]:
    return [(ord(letter), mark == "^") for letter, mark in zip(text, marks, strict=True)]


class TestSupervised:
    def test_every_token_of_a_string(self) -> None:
        expected = [(BEGIN, True), *marked("ab", "^^"), (END, True)]
        assert learned(Text(text="ab"), every_token) == expected
        assert learned(Completion(prompt="a", completion="b"), every_token) == expected

    def test_completions_only(self) -> None:
        example = Completion(prompt="ab", completion="c")
        expected = [(BEGIN, False), *marked("abc", "  ^"), (END, True)]
        assert learned(example, completion_tokens) == expected

    @pytest.mark.parametrize("template", [TAGGED, UNTAGGED])
    def test_the_turns_of_the_assistant(self, template: ChatTemplate) -> None:
        chat = [*CHAT, message("assistant", "yy")]
        expected = marked("uQ.ax.uR.ayy.", "    ^^    ^^^")
        assert learned(Text(text=chat), assistant_tokens, template=template) == expected
        example = Completion(prompt=chat[:3], completion=chat[3:])
        assert learned(example, assistant_tokens, template=template) == expected
        last = marked("uQ.ax.uR.ayy.", "          ^^^")
        assert learned(example, completion_tokens, template=template) == last

    def test_a_token_across_the_beginning_of_a_turn_is_learned_one_across_its_end_is_not(
        self,
    ) -> None:
        across = ChatTemplate("u:{% generation %}ab:{% endgeneration %}c")
        text = learned(Text(text=CHAT), assistant_tokens, template=across)
        expected = [(ord("u"), False), (MERGED * ord("a"), True), (ord("b"), True)]
        assert text == [*expected, (MERGED * ord("c"), False)]

    def test_long_texts_lose_their_end_and_those_with_nothing_to_learn_are_left_out(self) -> None:
        examples = [
            Completion(prompt=prompt, completion="xy", place=Place("f", len(prompt)))
            for prompt in ("a", "ab", "abc")
        ]
        options = {"learn": completion_tokens, "max_length": 4}
        found, report = tokenized.supervised(examples, TOKENIZER, **options)
        assert [text.tokens for text in found] == [[BEGIN, *ids("axy")], [BEGIN, *ids("abx")]]
        assert [place.line for place in report.shortened] == [1, 2]
        assert [place.line for place in report.left_out] == [3]
        found, report = tokenized.supervised(examples, TOKENIZER, long_text=keep_end, **options)
        assert [text.tokens for text in found] == [
            [*ids("axy"), END], [*ids("bxy"), END], [*ids("cxy"), END]
        ]  # fmt: skip
        with pytest.raises(DataError, match="nothing is left of 3 examples"):
            tokenized.supervised(examples, TOKENIZER, long_text=leave_out, **options)

    def test_a_dialogue_without_a_turn_of_the_assistant_is_not_called_too_long(self) -> None:
        examples = [Text(text=CHAT), Text(text=CHAT[:1])]
        (_,), report = tokenized.supervised(
            examples, TOKENIZER, learn=assistant_tokens, template=TAGGED
        )
        assert (report.unlearned, report.left_out) == ([Place("example", 2)], [])
        assert "1 left out without anything to learn, such as a turn" in str(report)

    @pytest.mark.parametrize(
        ("learn", "message"),
        [(completion_tokens, "a text has no completion"), (assistant_tokens, "no turns of an")],
    )
    def test_what_cannot_be_learned_of_a_string(self, learn, message: str) -> None:
        with pytest.raises(DataError, match=message):
            learned(Text(text="ab"), learn)
