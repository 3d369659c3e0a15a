"""The reader of compiled programs against counts by hand and XLA's own; a whole iteration."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from benchmarks.scaling import COLLECTIVES, Instruction, Program
from rlhfjax import models

ROOT = Path(__file__).parents[2]


def compiled(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    # Fused as for users, whatever flags the tests run with.
    return jax.jit(function).lower(*arguments).compile({"xla_cpu_use_fusion_emitters": True})


def cost(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    return Program(compiled(function, *arguments).as_text()).cost()


def ones(*shape: int) -> Array:
    return jnp.ones(shape)


def test_a_product_costs_two_operations_for_each_of_its_terms() -> None:
    assert cost(jnp.matmul, ones(30, 40), ones(40, 50))["flops"] == 2 * 30 * 40 * 50
    batched = cost(
        lambda x, y: jnp.einsum("bhij,bhkj->bhik", x, y), ones(2, 3, 4, 5), ones(2, 3, 6, 5)
    )
    assert batched["flops"] == 2 * 2 * 3 * 4 * 5 * 6


def test_a_loop_costs_its_turns_forward_and_backward() -> None:
    def loss(x: Array, weights: Array) -> Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    arguments = ones(8, 64), ones(5, 64, 64)
    product = 2 * 8 * 64 * 64
    assert cost(loss, *arguments)["flops"] == 5 * product
    assert cost(jax.grad(loss, (0, 1)), *arguments)["flops"] == 3 * 5 * product


def test_a_loop_in_a_loop_costs_the_product_of_their_turns() -> None:
    def inner(x: Array, _: None) -> tuple[Array, None]:
        return jax.lax.fori_loop(2, 9, lambda _, x: jnp.tanh(x @ x), x), None

    def outer(x: Array) -> Array:
        return jax.lax.scan(inner, x, length=3)[0] @ x

    assert cost(outer, ones(32, 32))["flops"] == (3 * 7 + 1) * 2 * 32**3


def test_a_loop_that_the_data_may_end_costs_what_it_may_cost() -> None:
    def decode(x: Array) -> Array:
        def goes_on(carry: tuple[Array, Array]) -> Array:
            return (carry[0] < 16) & ~jnp.all(carry[1] > 2)

        return jax.lax.while_loop(
            goes_on, lambda carry: (carry[0] + 1, carry[1] @ carry[1]), (jnp.int32(1), x)
        )[1]

    program = compiled(decode, ones(32, 32)).as_text()
    assert "known_trip_count" not in program
    assert Program(program).cost()["flops"] == 15 * 2 * 32**3


def test_a_loop_without_a_bound_is_refused() -> None:
    def search(x: Array) -> Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    def stuck(x: Array) -> Array:
        return jax.lax.while_loop(
            lambda c: (c[0] < 3) & (c[1].sum() < 9.0),
            lambda c: (c[0], c[1] @ c[1]),
            (jnp.int32(1), x),
        )[1]

    for endless in (search, stuck):
        with pytest.raises(ValueError, match="nothing bounds the turns"):
            cost(endless, ones(8, 8))


def test_of_two_branches_the_dearer_counts() -> None:
    def either(which: Array, x: Array) -> Array:
        return jax.lax.cond(which, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert cost(either, jnp.bool_(False), ones(32, 32))["flops"] == 2 * 2 * 32**3


def test_bytes_are_those_that_xla_counts_where_there_is_no_loop() -> None:
    model = models.decoder(models.DecoderConfig(vocab_size=64, context_length=12, width=32))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def logits(params: Any, tokens: Array) -> Array:
        return model.logits(params, model.hidden(params, tokens, tokens >= 0))

    for function in (logits, jax.grad(lambda *x: logits(*x).sum())):
        program = compiled(function, params, jnp.ones((4, 12), jnp.int32))
        ours = Program(program.as_text()).cost()["bytes"]
        # They differ in the gradient of the embedding, where rows are added in place.
        np.testing.assert_allclose(ours, program.cost_analysis()["bytes accessed"], rtol=0.01)


def test_bytes_of_a_loop_are_those_of_one_turn_times_their_number() -> None:
    def program(turns: int) -> jax.stages.Compiled:
        return compiled(
            lambda x, weights: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights),
            ones(8, 64),
            ones(turns, 64, 64),
        )

    ten, thirty = (Program(program(turns).as_text()).cost()["bytes"] for turns in (10, 30))
    turn = (thirty - ten) / 20
    assert turn > 2 * 4 * 64 * 64  # its weights are cut out of the stack, and used
    once = program(10).cost_analysis()["bytes accessed"]  # XLA counts one turn of a loop
    np.testing.assert_allclose(ten - 9 * turn, once, rtol=0.01)


COLLECTIVE_TEXT = """HloModule exchange, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%wrapped (w: f32[8,4]) -> f32[2,4] {
  %w = f32[8,4]{1,0} parameter(0)
  ROOT %scattered.2 = f32[2,4]{1,0} reduce-scatter(%w), dimensions={0}, to_apply=%add
}

%chained (p: f32[8,4]) -> (f32[32,4], s32[2]) {
  %p = f32[8,4]{1,0} parameter(0)
  %gather.1 = f32[32,4]{1,0} all-gather(%p), frontend_attributes={chain_id="7"}
  ROOT %on = (f32[32,4], s32[2]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%chained.1 (q: f32[8,4]) -> f32[32,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %gather.2 = f32[32,4]{1,0} all-gather(%q), frontend_attributes={chain_id="7"}
}

%all-reduce-scatter.3 (r: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %whole = f32[8,4]{1,0} all-reduce(%r), to_apply=%add
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={2,4}
}

ENTRY %main (x: f32[8,4], h: bf16[6]) -> (f32[8,4], /*index=1*/f32[8,4]) {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %h = bf16[6]{0:T(256)(128)(2,1)} parameter(1)
  %both = (f32[8,4]{1,0:T(8,128)}, bf16[6]{0}) all-reduce(%x, %h), to_apply=%add
  %first = f32[8,4]{1,0} get-tuple-element(%both), index=0
  %started = f32[8,4]{1,0} all-reduce-start(%first), to_apply=%add
  %reduced = f32[8,4]{1,0} all-reduce-done(%started)
  %gathering = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%reduced), dimensions={0}
  %gathered = f32[32,4]{1,0} all-gather-done(%gathering)
  %scattered = f32[2,4]{1,0} reduce-scatter(%reduced), dimensions={0}, to_apply=%add
  %scattering = ((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[]) async-start(%reduced), calls=%wrapped
  %scattered.1 = f32[2,4]{1,0} async-done(%scattering), calls=%wrapped
  %begun = (f32[32,4], s32[2]) fusion(%reduced), kind=kCustom, calls=%chained
  %ended = f32[32,4]{1,0} fusion(%reduced), kind=kCustom, calls=%chained.1
  %fused = f32[2,4]{1,0} fusion(%reduced), kind=kCustom, calls=%all-reduce-scatter.3
  %swapped = f32[8,4]{1,0} all-to-all(%reduced), dimensions={0}
  %sending = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%swapped)
  %sent = f32[8,4]{1,0} collective-permute-done(%sending)
  ROOT %out = (f32[8,4]{1,0}, f32[8,4]{1,0}) tuple(%sent, %swapped)
}
"""


def test_what_passes_between_devices_counts_whole_and_once() -> None:
    found = Program(COLLECTIVE_TEXT).cost()
    assert {kind: found[kind] for kind in COLLECTIVES} == {
        "all-reduce": (128 + 12) + 128,
        "all-gather": 4 * 128 + 4 * 128,
        "reduce-scatter": 128 + 128 + 128,
        "all-to-all": 128,
        "collective-permute": 128,
    }


def test_sizes_of_elements() -> None:
    shape = "(bf16[3], pred[5]{0}, f8e4m3fn[2,2], s4[6], c64[], token[])"
    assert Instruction("x", shape, "tuple", (), "", "").bytes == 6 + 5 + 4 + 3 + 8


@pytest.mark.parametrize(
    ("image", "kernel", "result", "how", "terms"),
    [
        ("6,5", "5,7", "6,7", "dim_labels=bf_io->bf", 6 * 5 * 7),
        ("5,6", "7,5", "6,7", "dim_labels=fb_oi->bf", 6 * 5 * 7),
        # Four products side by side: each place meets one tap of its own.
        ("4,6,5", "4,7,5", "4,6,7",
         "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf", 4 * 6 * 5 * 7),
        # Three taps at nine places, less one at either end.
        ("2,9,5", "3,5,7", "2,9,7",
         "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 5 * 7 * (3 * 9 - 2)),
    ],
)  # fmt: skip
def test_products_that_a_tpu_writes_as_convolutions(
    image: str, kernel: str, result: str, how: str, terms: int
) -> None:
    text = f"""ENTRY %main (x: f32[{image}], y: f32[{kernel}]) -> f32[{result}] {{
  %x = f32[{image}] parameter(0)
  %y = f32[{kernel}] parameter(1)
  ROOT %z = f32[{result}] convolution(%x, %y), {how}
}}
"""
    assert Program(text).cost()["flops"] == 2 * terms


def test_a_product_inside_a_library_call_is_refused() -> None:
    text = """ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} custom-call(%x, %x), custom_call_target="__onednn$matmul"
}
"""
    with pytest.raises(ValueError, match="onednn"):
        Program(text).cost()


@pytest.mark.slow
def test_an_iteration_costs_each_of_two_devices_what_it_costs_one() -> None:
    sizes = "--layers 1 --width 16 --heads 2 --vocab 32 --batch 2 --prompt 4 --response 4"
    ran = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--devices", "1", "2", "--json",
         *sizes.split(), "--epochs", "3", "--minibatches", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    one, two = json.loads(ran.stdout)
    assert [one[kind] for kind in COLLECTIVES] == [0] * len(COLLECTIVES)
    assert one["flops"] == two["flops"] > 0
    assert one["arguments"] == two["arguments"] > 0
    np.testing.assert_allclose(two["bytes"], one["bytes"], rtol=0.1)
    size = {"vocab_size": 32, "context_length": 8, "width": 16, "num_layers": 1, "num_heads": 2}
    policy = jax.eval_shape(models.decoder(models.DecoderConfig(**size)).init, jax.random.key(0))
    value_head = 16 + 1
    gradients = 4 * (2 * sum(x.size for x in jax.tree.leaves(policy)) + value_head)
    assert 3 * gradients < two["all-reduce"] < 1.1 * 3 * gradients
