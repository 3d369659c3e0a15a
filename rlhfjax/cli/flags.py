"""Flags as TRL's users write them: what some are called here, and `--flag true`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import chain

_DTYPE = "--dtype bfloat16 computes in it, and trained parameters stay float32"
_EVERY_STEP = "every step is logged, in metrics.jsonl under --output_dir"
_HELD_OUT = (
    "--eval_fraction holds records out, for `reward` and `evaluate`; nothing is tested between"
)
_FILES = "--dataset_name takes the file itself, such as train.jsonl"
_SAVED = "--save_steps says how often, and the last step is saved as well"
_ADAMW = (
    "the optimiser is AdamW with 0.9, 0.999 and 1e-8; there are --learning_rate, --weight_decay"
)
_ITSELF = "the model that is trained draws the samples itself"
_WHOLE = "weights are not quantised; --use_peft trains an adapter alone"
_HUB = "nothing is sent to the Hub: `hf upload` takes the directory export under --output_dir"

INSTEAD = {
    "adam_beta1": _ADAMW,
    "adam_beta2": _ADAMW,
    "adam_epsilon": _ADAMW,
    "beta": "it is --kl_coef",
    "bf16": _DTYPE,
    "dataset_config": _FILES,
    "dataset_test_split": _HELD_OUT,
    "dataset_text_field": "--rename COLUMN=text",
    "dataset_train_split": _FILES,
    "do_eval": _HELD_OUT,
    "eval_steps": _HELD_OUT,
    "eval_strategy": _HELD_OUT,
    "evaluation_strategy": _HELD_OUT,
    "fp16": _DTYPE,
    "gradient_checkpointing_kwargs": "--gradient_checkpointing needs none",
    "hub_model_id": _HUB,
    "kl_coef": "it is --beta",
    "load_in_4bit": _WHOLE,
    "load_in_8bit": _WHOLE,
    "logging_dir": "all that a run leaves behind is under --output_dir",
    "logging_first_step": _EVERY_STEP,
    "logging_steps": _EVERY_STEP,
    "logging_strategy": _EVERY_STEP,
    "lora_dropout": "adapters have no dropout; leave it out",
    "loss_type": "each command has one loss; the library has the others",
    "max_new_tokens": "it is --max_completion_length",
    "max_seq_length": "it is --max_length",
    "optim": _ADAMW,
    "overwrite_output_dir": "a run is never overwritten: --resume goes on with it",
    "per_device_eval_batch_size": "it is that of training, --per_device_train_batch_size",
    "push_to_hub": _HUB,
    "response_length": "it is --max_completion_length",
    "resume_from_checkpoint": "--resume goes on from the last step in --output_dir",
    "reward_model_path": "it is --reward_funcs, which takes a reward model's directory",
    "run_name": "a run is called as the last part of --output_dir",
    "save_strategy": _SAVED,
    "sft_model_path": "it is --model_name_or_path",
    "torch_dtype": _DTYPE,
    "total_episodes": "--max_steps or --num_train_epochs says how long",
    "trust_remote_code": "code that comes with a model is never run; leave it out",
    "use_vllm": _ITSELF,
    "vllm_mode": _ITSELF,
}
"""TRL's flag → what to write here."""


def advice(name: str, known: Collection[str]) -> str | None:
    """What to write in place of one of TRL's flags.

    Args:
      name: of the flag, without hyphens.
      known: the flags of the command.

    Returns:
      a hint; None for a flag that is known, and where there is none that holds for the command.
    """
    hint = INSTEAD.get(name, "")
    fits = set(re.findall(r"--(\w+)", hint)) <= set(known)
    return hint if hint and fits and name not in known else None


def switched(flags: Sequence[str], switches: Collection[str]) -> list[str]:
    """Flags where `--flag true` has become `--flag`, and `--flag false` `--no_flag`.

    Args:
      flags: as on the command line.
      switches: names of those that are true or false.

    Returns:
      the same, as the parser reads them.
    """
    parts = (flag.split("=", 1) if name_of(flag) in switches else [flag] for flag in flags)
    said: list[str] = []
    for part in chain.from_iterable(parts):
        switch = name_of(said[-1]) if said else ""
        if switch in switches and part.lower() in ("true", "false"):
            said[-1] = f"--{switch}" if part.lower() == "true" else f"--no_{switch}"
        else:
            said.append(part)
    return said


def name_of(flag: str) -> str:
    """`--a-flag` or `--a_flag=1` as `a_flag`; of what is no flag, nothing."""
    found = re.match(r"--([\w-]+)", flag)
    return found[1].replace("-", "_") if found else ""
