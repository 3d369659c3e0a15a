"""Tools that a policy calls, as functions on tokens: a calculator and a keyed store.

A call is what stands between two brackets, and the user says which tokens are the brackets, the
digits and the operators. All functions are of one row, to be vmapped, and live in the graph; -1 is
no token throughout. `rollout.with_tool` makes an environment of them:

    def tool(state, tokens):
        call = tools.last_call(tokens, open_token=OPEN, close_token=CLOSE)
        return tools.calculate(call, digits=DIGITS, plus=PLUS, times=TIMES, size=6)

    environment = rollout.with_tool(pose, tool, grade)
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array

NO_TOKEN = -1
LARGEST = 2_000_000_000
Reading = tuple[Array, Array, Array, Array, Array]
"""Sum, product and number so far, whether a number is being read, and whether all is well."""


def last_call(tokens: Array, *, open_token: int, close_token: int) -> Array:
    """What stands between the last closing bracket and the opening one before it.

    Args:
      tokens: [T] int, such as a turn of the policy.
      open_token: begins a call.
      close_token: ends it.

    Returns:
      [T] int32, what is in the call at the front; -1 behind it, and throughout where there is no
      whole call, or nothing in it.

    Raises:
      AssertionError: `tokens` is not [T] or not of integers.
    """
    _check(tokens)
    columns = jnp.arange(len(tokens))
    end = jnp.max(jnp.where(tokens == close_token, columns, -1), initial=-1)
    begin = jnp.max(jnp.where((tokens == open_token) & (columns < end), columns, -1), initial=-1)
    source = begin + 1 + columns
    inside = (begin >= 0) & (source < end)
    return jnp.where(inside, tokens[jnp.minimum(source, len(tokens) - 1)], NO_TOKEN).astype(
        jnp.int32
    )


def calculate(
    expression: Array, *, digits: Sequence[int], plus: int, times: int, size: int
) -> Array:
    """The digits of a sum of products of numbers, such as 12+3*45.

    Args:
      expression: [T] int, tokens of digits and operators; -1 is skipped.
      digits: the ten tokens of 0 to 9.
      plus: the token of a sum.
      times: the token of a product, which binds more tightly.
      size: O, room for the digits.

    Returns:
      [O] int32, the digits of the result at the end, -1 before them; -1 throughout where the
      expression has another token, an operator without a number on either side or no number, or
      where a result, or one on the way to it, is larger than 2·10⁹ or has no room.

    Raises:
      AssertionError: `expression` is not [T] or not of integers.
      ValueError: there are not ten digits.
    """
    _check(expression)
    if len(digits) != 10:
        raise ValueError(f"ten digits are wanted, not {len(digits)}")

    def read(carry: Reading, token: Array) -> tuple[Reading, None]:
        total, product, number, in_number, good = carry
        is_digit = token == jnp.asarray(digits)
        skipped, operator = token == NO_TOKEN, (token == plus) | (token == times)
        longer, fits = _times_plus(number, jnp.int32(10), jnp.argmax(is_digit).astype(jnp.int32))
        multiplied, fits_product = _times_plus(product, number, jnp.int32(0))
        added, fits_total = _times_plus(product, number, total)
        known = jnp.where(is_digit.any(), fits, operator & in_number)
        known &= jnp.where(token == times, fits_product, True)
        known &= jnp.where(token == plus, fits_total, True)
        new = (
            jnp.where(token == plus, added, total),
            jnp.where(token == plus, 1, jnp.where(token == times, multiplied, product)),
            jnp.where(is_digit.any(), longer, 0),
            is_digit.any(),
            good & known,
        )
        return jax.tree.map(lambda x, y: jnp.where(skipped, x, y), carry, new), None

    zero, one = jnp.int32(0), jnp.int32(1)
    start = zero, one, zero, jnp.bool_(False), jnp.bool_(True)
    (total, product, number, in_number, good), _ = jax.lax.scan(read, start, expression)
    result, fits = _times_plus(product, number, total)
    found = write_number(result, digits=digits, size=size)
    return jnp.where(good & in_number & fits, found, NO_TOKEN)


def look_up(key: Array, keys: Array, values: Array) -> Array:
    """The value of the record with this key.

    Args:
      key: [T] int, its tokens; -1 is skipped.
      keys: [N, L] int, the keys of the records, right-padded with -1.
      values: [N, O] int, what is stored under each, with -1 where there is no token.

    Returns:
      [O] int32, the value of the first record with exactly this key; -1 throughout where there is
      none, or the key is empty.

    Raises:
      AssertionError: shapes do not fit or these are not integers.
    """
    _check(key)
    chex.assert_rank([keys, values], 2)
    chex.assert_equal_shape_prefix([keys, values], 1)
    chex.assert_type([keys, values], int)
    size = max(len(key), keys.shape[1])
    key = jnp.pad(key, (0, size - len(key)), constant_values=NO_TOKEN)
    keys = jnp.pad(keys, ((0, 0), (0, size - keys.shape[1])), constant_values=NO_TOKEN)
    order = jnp.argsort(key == NO_TOKEN, stable=True)
    same = (keys == key[order]).all(1) & (key != NO_TOKEN).any()
    return jnp.where(same.any(), values[jnp.argmax(same)], NO_TOKEN).astype(jnp.int32)


def read_number(tokens: Array, *, digits: Sequence[int]) -> Array:
    """The number that digits stand for.

    Args:
      tokens: [T] int; -1 is skipped.
      digits: the ten tokens of 0 to 9.

    Returns:
      [] int32; -1 where there is another token, no digit, or the number is larger than 2·10⁹.

    Raises:
      AssertionError: `tokens` is not [T] or not of integers.
    """
    _check(tokens)

    def read(carry: tuple[Array, Array], token: Array) -> tuple[tuple[Array, Array], None]:
        number, good = carry
        is_digit = token == jnp.asarray(digits)
        longer, fits = _times_plus(number, jnp.int32(10), jnp.argmax(is_digit).astype(jnp.int32))
        skipped = token == NO_TOKEN
        good &= skipped | (is_digit.any() & fits)
        return (jnp.where(skipped | ~good, number, longer), good), None

    start = jnp.int32(0), (tokens != NO_TOKEN).any()
    (number, good), _ = jax.lax.scan(read, start, tokens)
    return jnp.where(good, number, -1)


def write_number(number: Array, *, digits: Sequence[int], size: int) -> Array:
    """The digits of a number, without leading zeros.

    Args:
      number: [] int, not negative.
      digits: the ten tokens of 0 to 9.
      size: O, room for them.

    Returns:
      [O] int32, the digits at the end, -1 before them; -1 throughout where they have no room.
    """

    def last_digit(rest: Array, _: None) -> tuple[Array, Array]:
        return rest // 10, jnp.where(rest > 0, jnp.asarray(digits)[rest % 10], NO_TOKEN)

    number = jnp.asarray(number, jnp.int32)
    rest, backwards = jax.lax.scan(last_digit, number, length=size)
    backwards = backwards.at[0].set(jnp.asarray(digits)[number % 10])
    return jnp.where(rest == 0, backwards[::-1], NO_TOKEN).astype(jnp.int32)


def _check(tokens: Array) -> None:
    chex.assert_rank(tokens, 1)
    chex.assert_type(tokens, int)


def _times_plus(x: Array, factor: Array, addend: Array) -> tuple[Array, Array]:
    """x·factor + addend, and whether that is within `LARGEST`; if not, 0."""
    exact = x * factor + addend
    # float32 tells what int32 has no room for: it is off by less than 10⁻⁶ of it.
    about = x.astype(jnp.float32) * factor + addend
    fits = (about < 1.01 * LARGEST) & (exact <= LARGEST)
    return jnp.where(fits, exact, 0), fits
