"""`rlhfjax evaluate`: two policies on the same prompts, under a judge."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rlhfjax import checkpoint, kl, masked, rewards, sharding
from rlhfjax.cli.arguments import Evaluate
from rlhfjax.cli.commands import judges, training
from rlhfjax.cli.commands.generate import completer, prompts_of, texts_of, tokens_of
from rlhfjax.cli.plots import BLUE, ORANGE, STYLE
from rlhfjax.data import formats
from rlhfjax.data.tokenized import Tokenized
from rlhfjax.log_probs import response_log_probs
from rlhfjax.pretrained import Pretrained
from rlhfjax.types import LanguageModel, Rollout

INTERVAL = 1.96  # standard errors, 95 %


class Answers(NamedTuple):
    """What a policy answered.

    Attributes:
      texts: [N][n], n completions of each prompt.
      scores: [N, n] of the judge, NaN where it has no opinion.
      lengths: [N, n] tokens.
      kl: [N, n] of the policy from the baseline, NaN where their tokens differ.
    """

    texts: list[list[str]]
    scores: np.ndarray
    lengths: np.ndarray
    kl: np.ndarray


def run(args: Evaluate) -> None:
    """Writes a table, a picture and the completions."""
    found_examples = training.examples(args, [args.dataset_name], formats.PROMPTS)[1]
    examples = found_examples[0][: args.max_prompts]
    if not examples:
        raise ValueError(f"--eval_fraction {args.eval_fraction} leaves no prompt")
    judges.must_exist([args.judge])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    baseline = replace(args, model_name_or_path=args.baseline_name_or_path)
    with jax.set_mesh(mesh):
        source, other = training.load(args, mesh), training.load(baseline, mesh)
        asked = of_both(*(prompts_of(args, own, examples) for own in (source, other)))
        with judges.named([args.judge], source, mesh) as judge:
            found = {
                name: answers(args, own, other, items, judge, mesh)
                for name, own, items in zip(
                    ("policy", "baseline"), (source, other), asked, strict=True
                )
            }
    table = {name: summary(of) for name, of in found.items()}
    comparison = win_rate(found["policy"].scores, found["baseline"].scores)
    curve = {name: best_of(of.scores) for name, of in found.items()}
    content = {**table, "win_rate": comparison, "best_of_n": curve}
    checkpoint.write_json(args.output_dir / "evaluation.json", content)
    text = markdown(table, comparison)
    (args.output_dir / "evaluation.md").write_text(text, encoding="utf-8")
    picture(curve, args.output_dir / "best_of_n.png")
    with (args.output_dir / "completions.jsonl").open("w", encoding="utf-8") as file:
        for row, item in enumerate(asked[0]):
            line: dict[str, Any] = {"prompt": item.example.prompt}
            for name, of in found.items():
                line |= {name: of.texts[row], f"{name}_scores": of.scores[row].tolist()}
            print(json.dumps(line, ensure_ascii=False), file=file)
    print(text)


def of_both(
    own: list[Tokenized], other: list[Tokenized]
) -> tuple[list[Tokenized], list[Tokenized]]:
    """The prompts that both policies can be asked, in the same order."""
    sides = [{id(item.example): item for item in of} for of in (own, other)]
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        raise ValueError("no prompt fits both policies: look at the data and --max_new_tokens")
    return [sides[0][name] for name in common], [sides[1][name] for name in common]


def answers(
    args: Evaluate,
    own: Pretrained[LanguageModel],
    baseline: Pretrained[LanguageModel],
    items: list[Tokenized],
    judge: rewards.Combined,
    mesh: Any,
) -> Answers:
    """`--best_of` completions of each prompt, and what is thought of them."""
    complete = completer(args, own, mesh)
    alike = own.files.get("tokenizer.json") == baseline.files.get("tokenizer.json")
    divergence = jax.jit(partial(divergences, baseline.model, temperature=args.temperature or 1.0))
    texts: list[list[str]] = [[] for _ in items]
    columns: list[dict[str, list[Any]]] = []
    for seed in range(args.best_of):
        found: dict[str, list[Any]] = {"score": [], "length": [], "kl": []}
        row = 0
        for batch, samples in complete(own.params, items, seed=seed):
            real = len(batch)
            written = texts_of(own, samples)[:real]
            for text in written:
                texts[row].append(text)
                row += 1
            ids = tokens_of(samples)[:real]
            scores, _ = judges.ask(
                judge, [item.example for item in batch], written, completion_ids=ids
            )
            found["score"] += scores.tolist()
            found["length"] += np.asarray(samples.response_mask).sum(1)[:real].tolist()
            found["kl"] += (
                np.asarray(divergence(baseline.params, samples))[:real].tolist()
                if alike
                else [np.nan] * real
            )
        columns.append(found)
    numbers = {name: np.array([c[name] for c in columns]).T for name in columns[0]}
    return Answers(texts, numbers["score"], numbers["length"], numbers["kl"])


def divergences(model: LanguageModel, params: Any, samples: Rollout, *, temperature: float) -> Any:
    """[B] Σ log π - log π_baseline over the tokens of a completion, of mean KL."""
    mask = samples.response_mask
    ref_log_probs, _ = response_log_probs(
        model, params, samples.tokens, samples.attention_mask, mask.shape[1],
        temperature=temperature,
    )  # fmt: skip
    return sharding.whole(masked.sum(kl.k1(samples.log_probs, ref_log_probs), mask, axis=1))


def summary(found: Answers) -> dict[str, Any]:
    """Means with half the width of their 95 % intervals; prompts are what varies."""
    words = [text.split() for of in found.texts for text in of]
    pairs = [pair for text in words for pair in pairwise(text)]
    texts = [text for of in found.texts for text in of]
    if not np.isfinite(found.scores).any():
        raise ValueError("the judge has no opinion on any completion: look at --judge")
    return {
        "reward": mean_of(of_prompts(found.scores)),
        "kl": mean_of(of_prompts(found.kl)),
        "length": mean_of(found.lengths.mean(1)),
        "distinct_texts": len(set(texts)) / len(texts),
        "distinct_pairs_of_words": len(set(pairs)) / max(len(pairs), 1),
    }


def of_prompts(values: np.ndarray) -> np.ndarray:
    """[N, n] → [N], the mean of those that are numbers; NaN where none is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


def mean_of(values: np.ndarray) -> dict[str, float | None]:
    """The mean of those that are numbers, and 1.96 standard errors; None where they say nothing."""
    known = values[np.isfinite(values)]
    n = len(known)
    return {
        "mean": float(known.mean()) if n else None,
        "ci95": float(INTERVAL * known.std(ddof=1) / n**0.5) if n > 1 else None,
        "count": n,
    }


def win_rate(own: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """How often a completion scores above the other policy's to the same prompt, ties half.

    Args:
      own: [N, n] scores.
      other: [N, n] scores.

    Returns:
      over all n² pairs of each prompt the mean, with its interval over prompts.
    """
    differences = own[:, :, None] - other[:, None, :]
    wins = np.where(np.isnan(differences), np.nan, (np.sign(differences) + 1) / 2)
    return mean_of(of_prompts(wins.reshape(len(own), -1)))


def best_of(scores: np.ndarray) -> list[float]:
    """E[max of k completions] for k = 1, …, n, from n of each prompt, without bias.

    Σᵢ C(i - 1, k - 1) / C(n, k) · x₍ᵢ₎ of the scores in ascending order.
    """
    ordered = np.sort(scores[np.isfinite(scores).all(1)], axis=1)
    n = ordered.shape[1]
    return [
        float(np.mean(ordered @ [comb(i, k - 1) / comb(n, k) for i in range(n)]))
        for k in range(1, n + 1)
    ]


def markdown(table: dict[str, Any], wins: dict[str, float | None]) -> str:
    """The table for a reader."""
    names = list(table)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in table[names[0]]:
        cells = [_cell(table[name][row]) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append(f"\n{names[0]} is better in {_cell(wins)} of comparisons.\n")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, dict):
        return "–" if value is None else f"{value:.3f}"
    return f"{_cell(value['mean'])} ± {_cell(value['ci95'])}"


def picture(curve: dict[str, list[float]], path: Path) -> None:
    """Reward of the best of n completions."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for (name, values), colour in zip(curve.items(), (BLUE, ORANGE), strict=True):
            axis.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=3)
            axis.annotate(
                name, (len(values), values[-1]), xytext=(6, 0), textcoords="offset points",
                color=colour, va="center", annotation_clip=False,
            )  # fmt: skip
        axis.set_xlabel("n, completions of each prompt")
        axis.set_ylabel("reward of the best")
        figure.savefig(path, dpi=220)
