"""What a PPO iteration costs each device as devices are added; reads it off the compiled program.

    python benchmarks/scaling.py --mesh data --devices 1 2 4 8 --layers 2 --width 64 --heads 8 \
        --vocab 512 --batch 8 --prompt 8 --response 16 --epochs 2 --minibatches 2

For every number of devices the whole iteration is compiled for as many virtual CPU devices, on a
mesh in which one axis has them all; nothing is run. There are `--batch` prompts for each device:
a column that stays the same is the goal. Policy, reference, separate value model and reward model
are all of that size; the end token is disabled, which fixes the length of the decode loop; the
optimiser is AdamW with one update a minibatch.

The figures are those of one device, with the body of every loop multiplied by its turns: the
operations of matrix products, the bytes that are read and written (inside a fusion none are), and
the bytes of arrays that pass between devices. An array that is reduced or gathered counts whole,
however many devices take part: a ring of n sends (n - 1)/n of it from each of them to gather or to
scatter, and twice that to reduce to all.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax import models, sharding
from rlhfjax.algorithms import ppo, reward_model

Cost = Counter[str]  # "flops", "bytes", and bytes by kind of collective
Values = dict[int, int | None]  # scalars by their place among parameters, None where unknown

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand the update is
# They name what is there, or wait for what was counted where it started.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {f"{kind}-done" for kind in (*COLLECTIVES, "async", "copy")}
# Their results hold their operands too.
HANDED_ON = {"all-gather-start", "collective-permute-start", "copy-start"}
STARTS = 'custom_call_target="AsyncCollectiveStart"'
ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "copy": int,
    "convert": int,
    "compareLT": operator.lt,
    "compareLE": operator.le,
    "compareGT": operator.gt,
    "compareGE": operator.ge,
    "compareEQ": operator.eq,
    "compareNE": operator.ne,
}
INSTRUCTION = re.compile(r" *((?:ROOT )?%?[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)\n\}", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Args:
    """What a PPO iteration costs each device as devices are added."""

    mesh: Literal["data", "fsdp", "tensor"] = "data"
    """The axis of the mesh that grows."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    layers: int = 2
    """Blocks of every model."""
    width: int = 64
    """Size of the hidden states."""
    heads: int = 8
    """Attention heads."""
    kv_heads: int | None = None
    """Heads of keys and values; by default as many."""
    mlp_width: int | None = None
    """Inner size of the MLP; by default four times the width."""
    vocab: int = 512
    """Size of the vocabulary."""
    batch: int = 8
    """Prompts in an iteration, for each device."""
    prompt: int = 8
    """Tokens of a prompt."""
    response: int = 16
    """Tokens of a response."""
    epochs: int = 2
    """Passes over each batch."""
    minibatches: int = 2
    """Updates in each pass."""
    micro_batches: int = 1
    """Parts of a minibatch, one after the other."""
    tensor: int = 1
    """Devices that share each matrix, while another axis grows."""
    llama: bool = False
    """Llama's architecture in place of GPT-2's, bfloat16 compute and blocks computed again in the
    backward pass; reference and reward model are kept in bfloat16."""
    topology: str | None = None
    """A TPU slice such as v5e:2x4 to compile for; needs libtpu, but no TPU."""
    json: bool = False
    """One line of JSON in place of the table."""


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands where operands do, of a constant its value
    attributes: str

    @property
    def bytes(self) -> int:
        """Size of the result."""
        sizes = ((bits(dtype), math.prod(dims)) for dtype, dims in arrays(self.shape))
        return sum(each * count // 8 for each, count in sizes)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, such as `body=%a` or `calls={%a, %b}`."""
        names = re.search(rf"\b{attribute}=(\{{.*?\}}|%[\w.-]+)", self.attributes)
        return re.findall(r"%([\w.-]+)", names[1]) if names else []


class Computation:
    """Instructions by name, and the one whose result is that of all.

    Args:
      lines: one instruction each.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.instructions: dict[str, Instruction] = {}
        for line in lines:
            head, shape, opcode, rest = INSTRUCTION.match(line).groups()
            depth = accumulate((c == "(") - (c == ")") for c in rest)
            end = next(i for i, open_ones in enumerate(depth) if open_ones < 0)
            name = head.split("%")[-1]
            operands = tuple(re.findall(r"%([\w.-]+)", rest[:end]))
            self.instructions[name] = Instruction(
                name, shape, opcode, operands, rest[:end], rest[end:]
            )
            if head.startswith("ROOT"):
                self.root = self.instructions[name]

    def __getitem__(self, name: str) -> Instruction:
        """The instruction of that name, or the one whose result it is another view of."""
        found = self.instructions[name]
        return self[found.operands[0]] if found.opcode == "bitcast" else found

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def read(self, x: Instruction) -> Counter[str]:
        """Bytes that an instruction reads, by where they come from."""
        amounts = Counter({self[o].name: self[o].bytes for o in x.operands})
        if x.opcode in SLICES:
            amounts[self[x.operands[0]].name] = x.bytes
        elif x.opcode in UPDATES:
            amounts[self[x.operands[0]].name] = 0
        return amounts

    def written(self, name: str) -> int:
        """Bytes that are written: of an update in place, those of the update."""
        x = self[name]
        if x.opcode == "tuple":
            return sum(self.written(o) for o in x.operands)
        return self[x.operands[UPDATES[x.opcode]]].bytes if x.opcode in UPDATES else x.bytes

    def results(self, x: Instruction) -> int:
        """Bytes that an instruction writes, without operands that are handed on."""
        return self.written(x.name) - (self.read(x).total() if x.opcode in HANDED_ON else 0)

    @cached_property
    def bytes(self) -> int:
        """Read and written by all instructions as one, whose parameters are read in memory."""
        amounts = sum((self.read(x) for x in self if x.opcode not in FREE), Counter())
        parameters = (x for x in self if x.opcode == "parameter")
        return self.written(self.root.name) + sum(min(amounts[x.name], x.bytes) for x in parameters)


class Program:
    """A compiled program.

    Args:
      text: `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        for entry, name, lines in COMPUTATION.findall(re.sub(r"/\*.*?\*/", "", text)):
            self.computations[name] = Computation(lines.splitlines())
            if entry:
                self.entry = name
        self._costs: dict[str, Cost] = {}

    def cost(self, name: str | None = None) -> Cost:
        """Of one run of a computation; None: of the whole program."""
        name = name or self.entry
        if name not in self._costs:
            inside = self.computations[name]
            self._costs[name] = sum((self._cost(x, inside) for x in inside), Counter())
        return self._costs[name]

    def _cost(self, x: Instruction, inside: Computation) -> Cost:
        if x.opcode in FREE:
            return Counter()
        if x.opcode == "while":
            turn = self.cost(x.called("condition")[0]) + self.cost(x.called("body")[0])
            turns = self.turns(x, inside)
            return Counter({name: turns * amount for name, amount in turn.items()})
        if x.opcode == "conditional":  # the dearer branch, in every respect
            union: Cost = Counter()
            for part in ("branch_computations", "true_computation", "false_computation"):
                for branch in x.called(part):
                    union |= self.cost(branch)
            return union
        if x.opcode in {"call", "async-start"}:
            return self.cost((x.called("to_apply") or x.called("calls"))[0])
        if x.opcode == "fusion":
            traffic = self.computations[x.called("calls")[0]].bytes
        else:
            traffic = inside.read(x).total() + inside.results(x)
        return Counter(flops=self.flops(x, inside), bytes=traffic) + self.exchanged(x, inside)

    def exchanged(self, x: Instruction, inside: Computation) -> Cost:
        """Bytes by kind of a collective, or of those that a fusion holds.

        A TPU's compiler fuses what follows an all-reduce into it, and repeats a gather that goes on
        beside other work in each of the fusions that it accompanies: it counts where it starts.
        """
        if x.opcode == "fusion":
            (name,) = x.called("calls")
            fused = self.computations[name]
            texts = [y.attributes for y in fused]
            if any("chain_id=" in t for t in texts) and not any(STARTS in t for t in texts):
                return Counter()
            found = sum((self.exchanged(y, fused) for y in fused), Counter())
            if name.startswith("all-reduce-scatter"):
                return Counter({"reduce-scatter": found["all-reduce"]})
            return found
        kind = x.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Counter()
        sent = kind in {"reduce-scatter", "collective-permute"}
        return Counter({kind: inside.read(x).total() if sent else inside.results(x)})

    def flops(self, x: Instruction, inside: Computation) -> int:
        """2·M·N·K of a matrix product, 0 of anything else."""
        if x.opcode == "fusion":
            fused = self.computations[x.called("calls")[0]]
            return sum(self.flops(y, fused) for y in fused)
        if re.search(r'custom_call_target="[^"]*(matmul|gemm|conv|dot)', x.attributes):
            raise ValueError(f"the operations of this cannot be told from the text: {x}")
        if x.opcode not in {"dot", "convolution"}:
            return 0
        (left,), (right,), (result,) = (
            [dims for _, dims in arrays(shape)]
            for shape in (*(inside[o].shape for o in x.operands), x.shape)
        )
        if x.opcode == "convolution":
            return 2 * convolution_terms(left, right, result, x.attributes)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        return 2 * math.prod(result) * math.prod(left[d] for d in integers(contracted[1]))

    def turns(self, loop: Instruction, inside: Computation) -> int:
        """How often the body of a loop runs; at most, where the data may end it earlier."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        body = self.computations[loop.called("body")[0]]
        before, turns = None, 0
        now = self.values(inside[loop.operands[0]], inside, {})
        while now != before:
            goes_on = self.value(condition.root, condition, now)
            if goes_on is None:
                break
            if not goes_on:
                return turns
            before, turns = now, turns + 1
            now = self.values(body.root, body, now)
        raise ValueError(f"nothing bounds the turns of {loop}")

    def values(self, x: Instruction, inside: Computation, given: Values) -> Values:
        """The operands of an instruction, where they are integers and follow from those given."""
        return {i: self.value(inside[o], inside, given) for i, o in enumerate(x.operands)}

    def value(self, x: Instruction, inside: Computation, given: Values) -> int | None:
        """A scalar integer that follows from the parameters that are given; None: it does not."""
        if not re.match(r"([su]\d+|pred)\[\]", x.shape):
            return None
        if x.opcode == "constant":
            return int({"true": "1", "false": "0"}.get(x.literal, x.literal))
        if x.opcode == "parameter":
            return given.get(int(x.literal))
        if x.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", x.attributes)[1])
            return given.get(index) if inside[x.operands[0]].opcode == "parameter" else None
        operands = self.values(x, inside, given)
        if x.opcode in {"fusion", "call"}:
            called = self.computations[(x.called("calls") or x.called("to_apply"))[0]]
            return self.value(called[called.root.name], called, operands)
        known = [v for v in operands.values() if v is not None]
        if x.opcode == "and":  # what is not known might be true
            return min(known, default=None)
        name = x.opcode + "".join(re.findall(r"direction=(\w+)", x.attributes))
        return (
            ARITHMETIC[name](*known) if name in ARITHMETIC and len(known) == len(operands) else None
        )


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """dtype and dimensions of an array, or of each in a tuple."""
    return [(dtype, integers(dims)) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)]


def bits(dtype: str) -> int:
    """Bits of one element: 16 of bf16, 8 of f8e4m3fn and pred, 0 of a token."""
    size = re.search(r"\d+", dtype)
    return int(size[0]) if size else 8 * (dtype == "pred")


def convolution_terms(
    image: list[int], kernel: list[int], result: list[int], attributes: str
) -> int:
    """Products that a convolution sums; a TPU's compiler writes matrix products as such."""
    of_image, of_kernel, of_result = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", attributes
    ).groups()
    terms = result[of_result.index("b")] * math.prod(kernel[of_kernel.index(x)] for x in "io")
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", attributes.partition("window={")[2].split("}")[0])
    )
    for number in range(len(image) - 2):
        size, out = (
            dims[labels.index(str(number))]
            for dims, labels in ((image, of_image), (result, of_result))
        )

        def of_window(name: str, default: str, number: int = number) -> int:
            return int(window[name].split("x")[number].split("_")[0]) if name in window else default

        pad, apart = of_window("pad", 0), of_window("lhs_dilate", 1)
        stride, step = of_window("stride", 1), of_window("rhs_dilate", 1)
        places = (
            at * stride + tap * step - pad
            for at in range(out)
            for tap in range(of_window("size", 1))
        )
        terms *= sum(place % apart == 0 and 0 <= place // apart < size for place in places)
    return terms


def integers(text: str) -> list[int]:
    """`1,2` as numbers."""
    return [int(number) for number in text.split(",") if number]


def compiled(args: Args, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """The iteration for these devices; of its arguments nothing exists but shapes."""
    model = models.decoder(
        models.DecoderConfig(
            vocab_size=args.vocab,
            context_length=args.prompt + args.response,
            width=args.width,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            mlp_width=args.mlp_width,
            rotary_base=500_000.0 if args.llama else None,
            rms_norm=args.llama,
            gated_mlp=args.llama,
            bias=not args.llama,
            dtype=jnp.bfloat16 if args.llama else jnp.float32,
            remat=args.llama,
        )
    )
    scalar = models.scalar_model(model, models.linear_head(args.width, stddev=0.05))
    actor_critic = models.separate_trunks(model, scalar)
    optimizer = optax.adamw(1e-5)
    config = ppo.Config(
        num_tokens=args.response,
        pad_token=0,
        num_epochs=args.epochs,
        num_minibatches=args.minibatches,
        num_micro_batches=args.micro_batches,
    )

    def reward(params: Any, rollout: Any) -> jax.Array:
        return reward_model.score(
            scalar, params, rollout.tokens, rollout.attention_mask, first=args.prompt
        )

    def start(key: jax.Array) -> ppo.State:
        return ppo.init(actor_critic.init(key), optimizer, key, kl_coef=0.1)

    axes = {"data": 1, "fsdp": 1, "tensor": args.tensor}
    axes[args.mesh] *= len(devices) // math.prod(axes.values())
    mesh = sharding.mesh(**axes, devices=devices)

    def placed(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place),
            tree,
            sharding.shardings(tree, mesh),
        )

    rows = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
    shape = (args.batch * len(devices), args.prompt)
    prompts = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    prompt_mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
    state = placed(jax.eval_shape(start, jax.random.key(0)))
    frozen = placed(state.params, jnp.bfloat16 if args.llama else jnp.float32)
    reference, reward_params = frozen["policy"], frozen["value"]
    step = ppo.make_step(actor_critic, reward, optimizer, config)
    with jax.set_mesh(mesh):
        lowered = step.lower(
            state, prompts, prompt_mask, reference, reward_params, ppo.Hyperparameters()
        )
        # The text is the same without LLVM's optimisation, and there in half the time.
        return lowered.compile({"xla_backend_optimization_level": 0})


def main(args: Args) -> list[dict[str, int]]:
    """A row of figures for each number of devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    devices = jax.devices()
    if args.topology:
        devices = topologies.get_topology_desc(args.topology, "tpu").devices
    rows = []
    for num_devices in args.devices:
        program = compiled(args, devices[:num_devices])
        cost = Program(program.as_text()).cost()
        memory = program.memory_analysis()
        rows.append(
            {
                "devices": num_devices,
                "flops": cost["flops"],
                "bytes": cost["bytes"],
                **{kind: cost[kind] for kind in COLLECTIVES},
                "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            }
        )
    return rows


def table(rows: list[dict[str, int]]) -> str:
    """The rows in Markdown, in millions."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [
        [str(row["devices"]), *(f"{row[name] / 1e6:,.3f}" for name in names[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    figures = main(arguments)
    print(json.dumps(figures) if arguments.json else table(figures))
