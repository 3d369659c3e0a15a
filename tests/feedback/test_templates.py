"""Texts with blanks: what stands where, row by row, and what is refused."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.data.text import DataError
from rlhfjax.feedback import principles, templates
from rlhfjax.feedback.principles import Principle
from rlhfjax.feedback.templates import Question, Vocabulary
from rlhfjax.types import Rollout

WORDS = ["<pad>", "<unk>", "<s>", "is", "it", "kind", "yes", "no", "reply", "a", "b"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    return [NUMBER.get(word, 1) for word in text.split()]


WORDY = Vocabulary(encode, len(WORDS), begin=(2,), unknown=(1,))
A, B = NUMBER["a"], NUMBER["b"]


def field(rows: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> templates.Field:
    return jnp.array(rows, jnp.int32), jnp.array(mask, bool)


ONE = field([[A, B, 99], [77, 88, A]], [[1, 1, 0], [0, 0, 1]])
OTHER = field([[B, 55], [44, 66]], [[1, 0], [0, 0]])


def texts(filled: templates.Field) -> list[str]:
    tokens, mask = filled
    for row in np.asarray(mask):
        assert (np.diff(row.astype(int)) >= 0).all(), "padding is on the left"
    return [
        " ".join(WORDS[token] for token in row[real])
        for row, real in zip(np.asarray(tokens), np.asarray(mask), strict=True)
    ]


class TestFill:
    def test_row_by_row(self) -> None:
        template = templates.encode("it {prompt} reply {response} is kind", WORDY)
        filled = jax.jit(templates.fill)(template, {"prompt": OTHER, "response": ONE})
        assert texts(filled) == ["<s> it b reply a b is kind", "<s> it reply a is kind"]
        assert filled[0].dtype == jnp.int32
        # 2 + 2 + 1 + 3 + 2 places, of which the second row needs 6.
        assert filled[0].shape == (2, 10)
        assert filled[0][1, :4].tolist() == [0] * 4

    def test_a_blank_may_come_twice_and_at_the_ends(self) -> None:
        template = templates.encode("{response} is {response}", WORDY)
        filled = templates.fill(template, {"response": ONE, "prompt": OTHER})
        assert texts(filled) == ["<s> a b is a b", "<s> a is a"]

    def test_braces_are_written_twice(self) -> None:
        pieces, names = templates.parse("{{{response}}} {{x}}")
        assert (pieces, names) == (("{", "} {x}"), ("response",))

    def test_nothing_under_a_mask_reaches_the_text(self) -> None:
        template = templates.encode("it {response}", WORDY)
        tokens, mask = ONE
        changed = jnp.where(mask, tokens, -100), mask
        for left, right in zip(
            templates.fill(template, {"response": ONE}),
            templates.fill(template, {"response": changed}),
            strict=True,
        ):
            np.testing.assert_array_equal(left, right)

    def test_a_blank_without_a_field_is_refused(self) -> None:
        template = templates.encode("it {prompt} reply {response}", WORDY)
        with pytest.raises(ValueError, match=r"nothing is given for \{prompt\}, only for response"):
            templates.fill(template, {"response": ONE})

    def test_fields_of_different_rows_are_refused(self) -> None:
        template = templates.encode("it {prompt} reply {response}", WORDY)
        with pytest.raises(AssertionError):
            templates.fill(template, {"response": ONE, "prompt": tuple(x[:1] for x in OTHER)})


class TestSelect:
    def test_each_row_has_a_text_of_its_own(self) -> None:
        short = templates.encode("{response}", WORDY)
        long = templates.encode("is it {response} kind", WORDY)
        filled = templates.fill(
            templates.select([short, long], jnp.array([1, 0])), {"response": ONE}
        )
        assert texts(filled) == ["<s> is it a b kind", "<s> a"]

    def test_questions_bring_their_answers(self) -> None:
        template = templates.encode("{response}", WORDY)
        plain = Question(template, *templates.encode_answers(["yes", "no"], WORDY))
        wordy = Question(template, *templates.encode_answers(["it is", "no"], WORDY))
        found = templates.select_question([plain, wordy], jnp.array([1, 0, 1]))
        its = [[4, 3], [7, 0]]
        assert found.answers.tolist() == [its, [[6, 0], [7, 0]], its]
        assert found.mask.astype(int).tolist() == [
            [[1, 1], [1, 0]], [[1, 0], [1, 0]], [[1, 1], [1, 0]]
        ]  # fmt: skip

    def test_other_placeholders_are_refused(self) -> None:
        made = [templates.encode(text, WORDY) for text in ("{response}", "{prompt} {response}")]
        with pytest.raises(ValueError, match=r"same placeholders .* \{prompt\} \{response\}"):
            templates.select(made, jnp.array([0]))


@pytest.mark.parametrize(
    ("text", "needed", "message"),
    [
        ("is it kind", (), "has no placeholder"),
        ("{prompt} is", ("response",), r"has no placeholder \{response\}"),
        ("{respnse}", (), r"\{respnse\} in .* none of the placeholders \{prompt\}, \{response\}"),
        ("{}", (), "none of the placeholders"),
        ("{response!r}", (), "none of the placeholders"),
        ("{response} {", (), "write {{ and }} for braces"),
        ("{response} }", (), "write {{ and }} for braces"),
    ],
)
def test_bad_texts_are_refused(text: str, needed: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        templates.parse(text, needed=needed)


class TestAnswers:
    def test_are_padded_on_the_right(self) -> None:
        tokens, mask = templates.encode_answers(["yes", "no it is"], WORDY)
        assert tokens.tolist() == [[6, 0, 0], [7, 4, 3]]
        assert mask.tolist() == [[True, False, False], [True, True, True]]

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            (
                ["yes", "never"],
                "lacks a part of 'never': its tokens are .1., of which 1 is unknown",
            ),
            (["yes", " "], "the answer ' ' has no token"),
            (["yes", "yes "], "'yes' and 'yes ' are the tokens .* begins with the other"),
            (["it is", "it"], "'it is' and 'it' are the tokens .* begins with the other"),
        ],
    )
    def test_that_cannot_be_told_apart_are_refused(self, answers, message) -> None:
        with pytest.raises(DataError, match=message):
            templates.encode_answers(answers, WORDY)

    def test_that_share_a_beginning_only_are_fine(self) -> None:
        tokens, _ = templates.encode_answers(["it is", "it no"], WORDY)
        assert tokens.tolist() == [[4, 3], [4, 7]]

    def test_a_token_beyond_the_vocabulary_is_refused(self) -> None:
        small = WORDY._replace(size=7)
        with pytest.raises(DataError, match=r"lacks a part of 'no': its tokens are .7."):
            templates.encode_answers(["yes", "no"], small)

    def test_an_encoder_that_fails_is_told(self) -> None:
        strict = Vocabulary(lambda text: [NUMBER[word] for word in text.split()], len(WORDS))
        with pytest.raises(DataError, match="lacks 'never': KeyError"):
            templates.encode_answers(["yes", "never"], strict)


def test_fields_of_a_rollout_leave_out_what_begins_and_ends_a_text() -> None:
    tokens = jnp.array([[0, 2, A, B, 7, 0], [2, A, A, B, B, B]], jnp.int32)
    mask = jnp.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    samples = Rollout(tokens, mask, mask[:, 3:], jnp.zeros((2, 3)))
    fields = templates.fields_of(samples, drop=(2, 7))
    template = templates.encode("{prompt} reply {response}", WORDY._replace(begin=()))
    assert texts(templates.fill(template, fields)) == ["a reply b", "a a reply b b b"]


def test_the_vocabulary_of_a_model_directory() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from rlhfjax.pretrained.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(NUMBER, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>"}
    found = templates.vocabulary(Tokenizer(backend, 0, (0,), 2, special, None), size=32)
    assert found[1:] == (32, (2,), (1,))
    assert templates.encode("it is {response}", found).pieces[0].tolist() == [2, 4, 3]
    with pytest.raises(DataError, match="lacks a part of 'never'"):
        templates.tokens_of("never", found)
    # A model may know fewer tokens than its tokenizer.
    asked = {"question": "{response} is it kind", "answers": {"question": ("yes", "no")}}
    kind = Principle("kind", **asked)
    small = found._replace(size=5)
    with pytest.raises(
        DataError, match=r"principle 'kind': question: .* 5 is unknown to the model"
    ):
        principles.question(kind, small)
    with pytest.raises(DataError, match="texts begin with the token 2"):
        templates.encode("{response}", found._replace(size=2))


def test_what_a_tokenizer_drops_or_does_not_name_is_refused() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from rlhfjax.pretrained.tokenizer import Tokenizer

    def vocabulary(model, pre=None) -> Vocabulary:
        backend = tokenizers.Tokenizer(model)
        if pre is not None:
            backend.pre_tokenizer = pre
        return templates.vocabulary(Tokenizer(backend, 0, (0,), None, {}, None), size=300)

    pieces = {piece: number for number, piece in enumerate("ys")}
    silent = vocabulary(tokenizers.models.BPE(pieces, []))
    assert templates.tokens_of("ys", silent) == [0, 1]
    with pytest.raises(DataError, match=r"lacks ' yés': .*what is left is \['y', 's'\]"):
        templates.tokens_of(" yés", silent)
    unnamed = vocabulary(tokenizers.models.WordLevel({"<unk>": 0, "yes": 1}, "<unk>"))
    with pytest.raises(DataError, match="lacks a part of 'no'"):
        templates.tokens_of("no", unnamed)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = {byte: number for number, byte in enumerate(sorted(byte_level.alphabet()))}
    whole = vocabulary(tokenizers.models.BPE(alphabet, []), byte_level)
    assert len(templates.tokens_of("é 日\n", whole)) == 8
