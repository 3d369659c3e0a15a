"""Every family against transformers: logits, greedy tokens, tensors there and back."""

from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import left_padded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from public_models import CASES, Pair, V, pair_of  # noqa: E402

from rlhfjax import rollout, sampling  # noqa: E402
from rlhfjax.models import decoder  # noqa: E402
from rlhfjax.types import Params  # noqa: E402

S, T = 12, 32
TOKENS, MASK = left_padded(np.random.default_rng(0), [S, S - 4, S - 7], S, 0, V)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    return pair_of(*request.param, transformers.AutoModelForCausalLM, folder)


def test_logits_and_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    model = decoder(pair.known.config)

    @jax.jit
    def run(params: Params) -> tuple[jax.Array, jax.Array]:
        samples = rollout.generate(
            model, params, TOKENS, MASK, jax.random.key(0),
            num_tokens=T, pad_token=0, sampler=sampling.greedy,
        )  # fmt: skip
        return model.logits(params, model.hidden(params, TOKENS, MASK)), samples.responses

    logits, responses = run(pair.params)
    tokens, mask = torch.tensor(TOKENS).long(), torch.tensor(MASK).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = pair.theirs(tokens, attention_mask=mask, position_ids=positions).logits.numpy()
        greedy = pair.theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=T, do_sample=False, pad_token_id=0
        )
    scale = np.abs(expected[MASK]).max()
    assert expected[MASK].std() > 0.3
    # So near that the two kinds of GELU, 2e-4 apart, are told apart.
    np.testing.assert_allclose(logits[MASK], expected[MASK], rtol=0, atol=1e-5 * scale)
    np.testing.assert_array_equal(responses, greedy[:, S:])
    assert len(np.unique(responses)) > 3


def test_every_tensor_comes_back_as_it_was_and_none_is_left(pair: Pair) -> None:
    left = set(pair.tensors)
    for entry in pair.known.entries:
        stored = [pair.tensors[name] for name in entry.names]
        joined = entry.join(stored)
        assert (joined.shape, tuple(x.shape for x in stored)) == (entry.shape, entry.shapes)
        for back, once in zip(entry.split(joined), stored, strict=True):
            np.testing.assert_array_equal(back, once)
        left -= set(entry.names)
    assert left == set()
    shapes = jax.eval_shape(decoder(pair.known.config).init, jax.random.key(0))
    assert jax.tree.map(np.shape, pair.params) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("case", ["Llama 3", "GPT-2", "Gemma 3"])
def test_scores_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    classes = transformers.AutoModelForSequenceClassification
    pair = pair_of(kind, options | {"num_labels": 1}, classes, tmp_path)
    head = pair.known.head
    assert head is not None
    names = [name for entry in (*pair.known.entries, head) for name in entry.names]
    assert sorted(names) == sorted(pair.tensors)
    kernel = head.join([pair.tensors["score.weight"]])
    assert kernel.shape == head.shape
    np.testing.assert_array_equal(head.split(kernel)[0], pair.tensors["score.weight"])
    hidden = jax.jit(decoder(pair.known.config).hidden)(pair.params, TOKENS[:1], MASK[:1])
    with torch.no_grad():
        expected = pair.theirs(torch.tensor(TOKENS[:1]).long()).logits.numpy()
    np.testing.assert_allclose(hidden[:, -1] @ kernel, expected[:, 0], rtol=1e-4)
