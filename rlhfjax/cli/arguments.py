"""What may be asked of each command, under TRL's names where they mean the same.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is trained or asked."""

    model_name_or_path: Path
    """Directory in the Hugging Face layout: config.json, safetensors, tokenizer.json; or of an
    adapter in PEFT's format, which is merged into the model that it names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; trained parameters are float32."""
    chat_template_path: Path | None = None
    """A Jinja template in place of the model's own."""
    seed: int = 42
    """Decides order of data, new parameters and samples."""
    data: int | None = None
    """Mesh: parts of each batch; all devices that the other two leave, if it is not given."""
    fsdp: int = 1
    """Mesh: parts of each batch, and of parameters and optimiser state."""
    tensor: int = 1
    """Mesh: parts of each matrix."""
    distributed: bool = False
    """Ask the cluster (Cloud TPU, SLURM, GKE) for the other processes of this run."""
    config: Path | None = None
    """YAML file of any of these; what is given here goes before it."""


@dataclass(frozen=True, kw_only=True)
class Training(Model):
    """How it is trained."""

    dataset_name: tuple[Path, ...]
    """JSONL (also .gz), JSON or parquet files, or folders of them; several are mixed."""
    rename: tuple[str, ...] = ()
    """Columns under other names, such as `question=prompt answer=completion`."""
    eval_fraction: float = 0.0
    """Share of the records, by a hash of each, that is not learned from."""
    dataset_weights: tuple[float, ...] = ()
    """Shares of the files in the mixture; by their sizes if not given."""
    max_bad_records: int = 0
    """So many records that cannot be used are left out and reported; one more ends the command."""
    output_dir: Path
    """Everything that the run leaves behind."""
    resume: bool = False
    """Go on with the run in --output_dir, if there is one."""
    learning_rate: float
    """Peak of the schedule."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of the updates in which it rises."""
    warmup_steps: int = 0
    """Updates in which it rises, in place of --warmup_ratio."""
    weight_decay: float = 0.0
    """AdamW's, of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to it; 0: they are not."""
    num_train_epochs: float = 1.0
    """Passes over the data, or a part of one."""
    max_steps: int = -1
    """Steps in all, in place of --num_train_epochs."""
    per_device_train_batch_size: int = 8
    """Rows on a device at a time."""
    gradient_accumulation_steps: int = 1
    """Such batches in an update."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, the same result."""
    use_peft: bool = False
    """Train a LoRA adapter, and a reward model's head, and leave the model as it is."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Its products are scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Projections that get one, by the family's own names, such as `q_proj v_proj`; where they are
    one matrix here, all that it holds get it together."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported model."""
    save_steps: int = 100
    """Steps between two checkpoints."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl; none: nowhere."""


AT_LEAST_ONE = {
    "batch_size", "best_of", "data", "fsdp", "gradient_accumulation_steps", "lora_r",
    "log_completions_steps", "max_completion_length", "max_length", "max_new_tokens",
    "max_prompt_length", "max_prompts", "num_iterations", "num_mini_batches", "num_ppo_epochs",
    "per_device_train_batch_size", "save_steps", "save_total_limit", "stop_patience",
    "stop_window", "tensor",
}  # fmt: skip
"""Flags that count something of which there must be one."""
AT_LEAST_TWO = {"num_generations"}
POSITIVE = {"learning_rate", "lora_alpha", "num_train_epochs", "reward_time_limit"}
NOT_NEGATIVE = {
    "beta", "cliprange", "cliprange_value", "epsilon", "eval_fraction", "gamma", "kl_coef",
    "label_smoothing", "lam", "max_bad_records", "max_grad_norm", "seed", "temperature",
    "vf_coef", "warmup_ratio", "warmup_steps", "weight_decay",
}  # fmt: skip
AT_MOST_ONE = {"eval_fraction", "gamma", "label_smoothing", "lam", "warmup_ratio"}
WEIGHTS = {"dataset_weights": "dataset_name", "reward_weights": "reward_funcs"}
"""Flags with a number for each of another flag's."""
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_target_modules")
"""Flags that mean nothing without --use_peft."""


@dataclass(frozen=True, kw_only=True)
class SFT(Training):
    """Supervised fine-tuning: on texts, prompts with completions, or dialogues."""

    learning_rate: float = 2e-5
    max_length: int = 1024
    """Tokens of a row; longer ones lose their end."""
    packing: bool = False
    """Several texts in a row, none of which sees another."""
    completion_only_loss: bool = True
    """Learn completions, not prompts, where there are both."""
    assistant_only_loss: bool = False
    """Learn what the assistant says in dialogues."""


@dataclass(frozen=True, kw_only=True)
class Reward(Training):
    """A reward model from pairs, rankings, ratings or class labels; --eval_fraction tests it."""

    learning_rate: float = 1e-4
    max_length: int = 1024
    """Tokens of prompt and completion; longer ones lose their end."""


@dataclass(frozen=True, kw_only=True)
class Preference(Training):
    """What the methods have in common that learn from preferences directly."""

    learning_rate: float = 1e-6
    max_length: int = 1024
    """Tokens of prompt and completion."""
    max_prompt_length: int = 512
    """Longer prompts lose their beginning."""


@dataclass(frozen=True, kw_only=True)
class DPO(Preference):
    """Direct preference optimisation, from pairs."""

    beta: float = 0.1
    """β: how dear it is to leave the reference."""
    label_smoothing: float = 0.0
    """How often labels are taken to be wrong."""


@dataclass(frozen=True, kw_only=True)
class KTO(Preference):
    """Kahneman-Tversky optimisation, from completions that are good or bad."""

    beta: float = 0.1
    """β: how dear it is to leave the reference."""
    desirable_weight: float = 1.0
    """Weight of the good ones."""
    undesirable_weight: float = 1.0
    """Weight of the bad ones."""


@dataclass(frozen=True, kw_only=True)
class ORPO(Preference):
    """Odds-ratio preference optimisation, from pairs, without a reference."""

    learning_rate: float = 1e-6
    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood."""


@dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
    """Simple preference optimisation, from pairs, without a reference."""

    beta: float = 2.0
    """β: scale of the mean log-probabilities."""
    simpo_gamma: float = 0.5
    """γ: the margin that is asked for."""


@dataclass(frozen=True, kw_only=True)
class Online(Training):
    """What the methods have in common that learn from their own samples."""

    learning_rate: float = 1e-6
    reward_funcs: tuple[str, ...]
    """`file.py`, `file.py:function`, `package.module:function`, or a reward model's directory."""
    reward_weights: tuple[float, ...] = ()
    """One for each of them; 1 if not given."""
    reward_time_limit: float = 60.0
    """Seconds that a Python function may take for a batch."""
    reward_failures: Literal["raise", "mask"] = "raise"
    """End the run where a reward function fails, or leave the sample out."""
    max_prompt_length: int = 512
    """Longer prompts lose their beginning."""
    max_completion_length: int = 256
    """Tokens of a completion, as far as the context has room for them."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    num_mini_batches: int = 1
    """Updates in a pass over an iteration's samples; it has so many batches of them."""
    log_completions_steps: int = 10
    """Iterations between two tables of samples."""
    stop_at_reward: float | None = None
    """End the run when the score has reached it, in the mean of --stop_window iterations."""
    stop_at_kl: float | None = None
    """End it when the KL from the reference has, in nats a completion: a budget."""
    stop_patience: int | None = None
    """End it after so many iterations without a new best mean score."""
    stop_when_falls: str | None = None
    """Name of one of --reward_funcs, such as one of weight 0: end it when that one's mean falls
    while the score rises, see `stopping.turning_point`."""
    stop_window: int = 5
    """Iterations in a mean that is looked at."""


@dataclass(frozen=True, kw_only=True)
class PPO(Online):
    """Proximal policy optimisation, with a value model."""

    learning_rate: float = 3e-6
    num_ppo_epochs: int = 4
    """Passes over an iteration's samples."""
    kl_coef: float = 0.05
    """β: how dear it is to leave the reference."""
    cliprange: float = 0.2
    """ε of the policy's ratio."""
    cliprange_value: float = 0.2
    """ε of the values."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    gamma: float = 1.0
    """γ, the discount."""
    lam: float = 0.95
    """λ of GAE."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Online):
    """What the methods have in common that compare completions of a prompt."""

    num_generations: int = 8
    """Completions of each prompt."""
    num_iterations: int = 1
    """Passes over an iteration's samples."""


@dataclass(frozen=True, kw_only=True)
class GRPO(Grouped):
    """Group-relative policy optimisation."""

    beta: float = 0.0
    """How dear it is to leave the reference."""
    epsilon: float = 0.2
    """ε of the policy's ratio."""


@dataclass(frozen=True, kw_only=True)
class RLOO(Grouped):
    """REINFORCE with the other completions of a prompt as the baseline."""

    num_generations: int = 2
    beta: float = 0.05
    """How dear it is to leave the reference."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Model):
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Tokens of a completion."""
    temperature: float = 1.0
    """0: the likeliest token, always."""
    batch_size: int = 8
    """Prompts at a time."""


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Completions of prompts, as JSONL on standard output or in a file."""

    prompts: tuple[str, ...] = ()
    """The prompts themselves."""
    dataset_name: Path | None = None
    """Or a file of them."""
    rename: tuple[str, ...] = ()
    """Columns under other names, such as `question=prompt`."""
    eval_fraction: float = 0.0
    """Share of the records, by a hash of each, that is left out, as in training."""
    output: Path | None = None
    """Where the completions go; standard output if not given."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Sampling):
    """Compares a policy with another one on the same prompts, by a judge."""

    baseline_name_or_path: Path
    """The other policy, such as the one that training began with."""
    dataset_name: Path
    """Prompts."""
    rename: tuple[str, ...] = ()
    """Columns under other names, such as `question=prompt`."""
    eval_fraction: float = 1.0
    """Share of the records, by a hash of each: those that training with it held out."""
    judge: str
    """A reward function or a reward model's directory, as --reward_funcs of `grpo`."""
    max_prompts: int = 256
    """Prompts that are taken, the first ones."""
    best_of: int = 8
    """The curve of best-of-n goes up to it."""
    output_dir: Path
    """Table, picture and completions."""


@dataclass(frozen=True, kw_only=True)
class Export(Model):
    """A model of its own from one with a LoRA adapter, or in another dtype."""

    adapter: Path | None = None
    """Directory in PEFT's format; not needed where --model_name_or_path is one itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported model."""
    output_dir: Path
    """Directory in the Hugging Face layout."""


@dataclass(frozen=True, kw_only=True)
class Env:
    """Versions and devices, for a report."""
