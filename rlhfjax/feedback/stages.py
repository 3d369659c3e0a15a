"""The two stages of learning from principles, and the records that they leave to be audited.

First a model criticises its own responses by a principle and revises them; it is then fine-tuned
on what `revised` makes of them (`algorithms.sft`). Then a judge compares pairs of its responses, a
reward model learns from the probabilities (`algorithms.reward_model`), and the policy from that.
Sampling and judging are functions to be compiled; a record is a line of JSON that TRL and
`data.formats` read.

References:
  Bai et al. 2022, Constitutional AI: Harmlessness from AI Feedback.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import checkpoint, masked, rollout, sampling, sequences
from rlhfjax.feedback import templates
from rlhfjax.feedback.templates import Field, Template
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout


class Revisions(NamedTuple):
    """What a model says of responses, and what it makes of them.

    Attributes:
      critiques: its responses to the requests for a critique.
      revisions: its responses to the requests for a revision.
    """

    critiques: Rollout
    revisions: Rollout


def revise(
    model: LanguageModel,
    params: Params,
    critique_request: Template,
    revision_request: Template,
    fields: Mapping[str, Field],
    key: Array,
    *,
    num_tokens: int,
    pad_token: int,
    end_token: int | tuple[int, ...] | None = None,
    temperature: float | Array = 1.0,
    sampler: Callable[[Array, Array], Array] = sampling.categorical,
) -> Revisions:
    """response → critique → revision, the whole of it in the graph.

    To revise again, put the revisions in the place of the responses; `templates.select` gives each
    row the request of a principle of its own.

    Args:
      model: who criticises and revises.
      params: its parameters.
      critique_request: with `{response}`.
      revision_request: with `{response}` and `{critique}`.
      fields: `response`, and `prompt` if a request has it; see `templates.fields_of`.
      key: a typed key; consumed.
      num_tokens: of a critique, and of a revision.
      pad_token: fills them behind the end token.
      end_token: ends them, or several of which any does; it is no part of the critique that is read
        again.
      temperature: the logits are divided by it.
      sampler: as in `rollout.generate`.

    Returns:
      critiques and revisions.

    Raises:
      ValueError: a request with what is sampled is longer than the context.
    """
    critique_key, revision_key = jax.random.split(key)

    def respond(request: Template, fields: Mapping[str, Field], key: Array) -> Rollout:
        tokens, mask = templates.fill(request, fields, pad_token=pad_token)
        return rollout.generate(
            model,
            params,
            tokens,
            mask,
            key,
            num_tokens=num_tokens,
            pad_token=pad_token,
            end_token=end_token,
            temperature=temperature,
            sampler=sampler,
        )

    critiques = respond(critique_request, fields, critique_key)
    said = templates.without((critiques.responses, critiques.response_mask), _ends(end_token))
    revisions = respond(revision_request, {**fields, "critique": said}, revision_key)
    return Revisions(critiques, revisions)


def revised(
    prompt: Field, revisions: Rollout, *, end_token: int | tuple[int, ...] | None = None
) -> tuple[Array, Array, Array]:
    """Prompts with their revisions, as if these had been the responses: what is to be learned.

    `sft.loss(params, model, *revised(prompt, found.revisions))`, and a step of `sft` takes
    the same. What was asked for the revision is no part of it.

    Args:
      prompt: tokens [B, P] and mask, padded anywhere; with what every text begins with, so that the
        model learns from what it will be asked.
      revisions: of a `Revisions`, B of them.
      end_token: as in `revise`: a revision without another token says nothing, and is not learned.

    Returns:
      tokens [B, P + T] int32, left-padded prompts before right-padded revisions; the tokens to be
      learned, [B, P + T] bool; the real ones, [B, P + T] bool.

    Raises:
      AssertionError: there are not as many prompts as revisions, or a prompt's mask is another
        shape or not bool.
    """
    tokens, mask = prompt
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    chex.assert_type([tokens, mask], [int, bool])
    chex.assert_equal_shape([mask, revisions.response_mask], dims=0)
    tokens, mask = sequences.pad_left(tokens.astype(jnp.int32), mask, pad_value=0)
    real = revisions.response_mask
    said = templates.without((revisions.responses, real), _ends(end_token))[1].any(1, keepdims=True)
    return (
        jnp.concatenate([tokens, revisions.responses], axis=1),
        jnp.concatenate([jnp.zeros_like(mask), real & said], axis=1),
        jnp.concatenate([mask, real], axis=1),
    )


def _ends(end_token: int | tuple[int, ...] | None) -> Array | tuple[int, ...]:
    return () if end_token is None else jnp.ravel(jnp.asarray(end_token))


def soft_pairs(first: Rollout, second: Rollout, probs: Array) -> PreferenceBatch:
    """Two rollouts of the same prompts as pairs whose labels are probabilities.

    A response is what its mask says. Of episodes of several turns that would be the policy's turns
    without the observations between them: give `Episodes.with_observations`.

    Args:
      first: B responses.
      second: B responses of the same length to the same prompts.
      probs: [B], the probability that the first one is better; a pair whose probability is not
        finite is none, and so is one whose traced probability is not between 0 and 1.

    Returns:
      pairs in which `chosen` is the response that is better with a probability of ½ or more.

    Raises:
      AssertionError: shapes differ.
      ValueError: a finite value that is no probability, such as log-odds; a traced one is not
        looked at.
    """
    chex.assert_equal_shape([first.tokens, second.tokens])
    chex.assert_equal_shape([first.response_mask, second.response_mask])
    chex.assert_shape(probs, first.tokens.shape[:1])
    if not isinstance(probs, jax.core.Tracer) and getattr(probs, "is_fully_addressable", True):
        for row, prob in enumerate(np.asarray(probs, float).tolist()):
            _check_prob(prob, f"pair {row}")
    judged, swap = (probs >= 0) & (probs <= 1), (probs < 0.5)[:, None]
    probs = masked.fill(probs, judged, value=0.5)
    chosen, chosen_mask, rejected, rejected_mask = (
        jnp.where(swap, other, one)
        for one, other in (
            (first.responses, second.responses),
            (first.response_mask, second.response_mask),
            (second.responses, first.responses),
            (second.response_mask, first.response_mask),
        )
    )
    return PreferenceBatch(
        first.prompts,
        first.attention_mask[:, : first.prompts.shape[1]],
        chosen,
        chosen_mask & judged[:, None],
        rejected,
        rejected_mask & judged[:, None],
        jnp.maximum(probs, 1.0 - probs),
    )


def _check_prob(prob: float, where: str) -> None:
    """Log-odds would be labels too: those below ½ swap a pair, and all are finite."""
    if np.isfinite(prob) and not 0 <= prob <= 1:
        raise ValueError(
            f"{where}: {prob} is no probability between 0 and 1; of log-odds "
            "`judgement.mean_of_log_odds` and `judgement.mean_of_probs` make one"
        )


def revision_records(
    prompts: Sequence[str],
    responses: Sequence[str],
    critiques: Sequence[str],
    revisions: Sequence[str],
    *,
    principles: Sequence[str],
    judge: str,
) -> list[dict[str, Any]]:
    """Records of the first stage: `prompt` and `completion` to be learned, and how they came about.

    Args:
      prompts: N texts.
      responses: N, before the revision.
      critiques: N.
      revisions: N; where there is no text there is no record.
      principles: N names, by which each was criticised.
      judge: who did it, such as a model's name.

    Returns:
      at most N records of `prompt`, `completion`, `response`, `critique`, `principle`, `judge`.

    Raises:
      ValueError: not all are as many.
    """
    rows = zip(prompts, revisions, responses, critiques, principles, strict=True)
    names = ("prompt", "completion", "response", "critique", "principle")
    found = [dict(zip(names, row, strict=True)) | {"judge": judge} for row in rows]
    return [record for record in found if record["completion"]]


def comparison_records(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    probs: np.ndarray | Array,
    *,
    principles: Sequence[str],
    judge: str,
) -> list[dict[str, Any]]:
    """Records of the second stage: pairs with the probability that the chosen one is better.

    Args:
      prompts: N texts.
      first: N responses.
      second: N responses.
      probs: [N], the probability that the first one is better; without a finite one, and where both
        texts are the same, there is no record.
      principles: N names, by which each was judged.
      judge: who did it, such as a model's name.

    Returns:
      at most N records of `prompt`, `chosen`, `rejected`, `chosen_prob` (½ to 1), `principle`,
      `judge`; `data.formats` reads them with their probability.

    Raises:
      ValueError: not all are as many, or a finite value is no probability, such as log-odds.
    """
    found = []
    rows = zip(prompts, first, second, np.asarray(probs, float).tolist(), principles, strict=True)
    for row, (prompt, one, other, prob, principle) in enumerate(rows):
        _check_prob(prob, f"row {row}, principle {principle!r}")
        if one == other or not np.isfinite(prob):
            continue
        chosen, rejected = (one, other) if prob >= 0.5 else (other, one)
        found.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_prob": max(prob, 1.0 - prob),
                "principle": principle,
                "judge": judge,
            }
        )
    return found


def write_records(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as lines of JSON, all of them or none.

    Args:
      path: the file, replaced if it exists; its folder is made.
      records: any.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records]
    checkpoint.write_text(path, "".join(lines))
