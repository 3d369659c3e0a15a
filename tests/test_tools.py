"""Tools on tokens: a calculator that knows when it does not know, and a store."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import tools

TEXT = "0123456789+*[]abc"
LENGTH, SIZE = 16, 10
DIGITS, PLUS, TIMES, OPEN, CLOSE = range(10), 10, 11, 12, 13


def tokens(text: str, length: int = LENGTH) -> jax.Array:
    ids = [TEXT.index(c) for c in text]
    return jnp.array(ids + [-1] * (length - len(ids)), jnp.int32)


def text(ids: jax.Array) -> str:
    return "".join(TEXT[i] for i in np.asarray(ids) if i >= 0)


@jax.jit
@jax.vmap
def asked(turn: jax.Array) -> jax.Array:
    call = tools.last_call(turn, open_token=OPEN, close_token=CLOSE)
    return tools.calculate(call, digits=DIGITS, plus=PLUS, times=TIMES, size=SIZE)


def ask(*calls: str) -> list[str]:
    return [text(answer) for answer in asked(jnp.stack([tokens(call) for call in calls]))]


def test_it_calculates_what_python_does() -> None:
    rng = np.random.default_rng(0)
    expressions = ["0", "007+1", "2*3+4*5", "1+2*3", "0*9+0"]
    for _ in range(60):
        numbers = [
            str(rng.integers(0, 10 ** rng.integers(1, 5))) for _ in range(rng.integers(1, 5))
        ]
        signs = rng.choice(["+", "*"], len(numbers))
        expressions.append("".join(a + b for a, b in zip(numbers, signs, strict=True))[:-1])
    expressions = [e for e in expressions if len(e) <= LENGTH - 2]
    plain = [re.sub(r"\b0+(?=\d)", "", e) for e in expressions]
    expected = [str(value) if (value := eval(e)) <= 2_000_000_000 else "" for e in plain]
    assert ask(*(f"[{e}]" for e in expressions)) == expected
    assert len(expressions) > 40


@pytest.mark.parametrize(
    "wrong", ["+1", "1+", "1++2", "*", "", "12a", "2000000000+1", "99999*99999*0", "9999999999"]
)
def test_what_it_cannot_calculate_has_no_answer(wrong: str) -> None:
    assert ask(f"[{wrong}]") == [""]


def test_numbers_are_exact_up_to_two_billion() -> None:
    assert ask("[1999999999+1]", "[44721*44721]") == ["2000000000", str(44721**2)]


def test_an_answer_without_room_is_none() -> None:
    small = partial(tools.write_number, digits=DIGITS, size=2)
    assert [text(small(jnp.int32(n))) for n in (0, 7, 10, 99, 100)] == ["0", "7", "10", "99", ""]


@pytest.mark.parametrize(
    ("turn", "inside"),
    [
        ("1[2]3", "2"), ("[1][2+3]4", "2+3"), ("[1[2]", "2"), ("[1]2]", "1]2"), ("]1[", ""),
        ("[1", ""), ("1]", ""), ("[]", ""), ("12", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_last_call_of_a_turn_counts(turn: str, inside: str) -> None:
    call = tools.last_call(tokens(turn), open_token=OPEN, close_token=CLOSE)
    np.testing.assert_array_equal(call, tokens(inside))


def test_other_tokens_may_be_the_digits() -> None:
    found = tools.calculate(jnp.array([29, 5, 21]), digits=range(20, 30), plus=5, times=6, size=3)
    assert found.tolist() == [-1, 21, 20]
    with pytest.raises(ValueError, match="ten digits"):
        tools.calculate(jnp.array([1]), digits=(1, 2), plus=5, times=6, size=3)


@pytest.mark.parametrize(
    ("written", "number"),
    [("0", 0), ("120", 120), ("0012", 12), ("", -1), ("1a", -1), ("2000000000", 2_000_000_000),
     ("2000000001", -1), ("99999999999999", -1)],
)  # fmt: skip
def test_digits_stand_for_a_number(written: str, number: int) -> None:
    assert int(tools.read_number(tokens(written), digits=DIGITS)) == number


class TestStore:
    KEYS = jnp.stack([tokens(key, 3) for key in ("a", "ab", "ab", "abc", "")])
    VALUES = jnp.stack([tokens(value, 2) for value in ("1", "23", "45", "6", "7")])

    @pytest.mark.parametrize(
        ("key", "value"),
        [("a", "1"), ("ab", "23"), ("abc", "6"), ("b", ""), ("abca", ""), ("", "")],
    )
    def test_it_finds_the_first_record_of_exactly_that_key(self, key: str, value: str) -> None:
        for length in (4, LENGTH):
            found = tools.look_up(tokens(key, length), self.KEYS, self.VALUES)
            np.testing.assert_array_equal(found, tokens(value, 2))

    def test_what_is_no_token_is_skipped(self) -> None:
        key = jnp.array([-1, TEXT.index("a"), -1, TEXT.index("b")])
        assert text(tools.look_up(key, self.KEYS, self.VALUES)) == "23"

    def test_it_needs_a_value_for_every_key(self) -> None:
        with pytest.raises(AssertionError):
            tools.look_up(tokens("a"), self.KEYS, self.VALUES[1:])
        with pytest.raises(AssertionError):
            tools.look_up(jnp.zeros(3), self.KEYS, self.VALUES)
