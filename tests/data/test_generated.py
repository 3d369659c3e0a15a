import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from rlhfjax.data import generated
from rlhfjax.data.generated import generated_corpus, write_corpus
from rlhfjax.data.text import DataError, LabelledText, read_labelled

CORPUS = generated_corpus(6000, seed=0)


def words(text: str) -> list[str]:
    return [word.strip(".,;") for word in text.split()]


def accuracy(features: dict[str, list[str]]) -> float:
    """Of a vote of the features, each with its surplus of preferred texts, on the second half."""
    surplus: dict[str, float] = defaultdict(float)
    counts = Counter(f for text, _ in CORPUS[:3000] for f in features[text])
    for text, label in CORPUS[:3000]:
        for feature in features[text]:
            surplus[feature] += (1 if label else -1) / (counts[feature] + 10)
    return sum(
        (sum(surplus[f] for f in features[text]) > 0) == label for text, label in CORPUS[3000:]
    ) / len(CORPUS[3000:])


def test_texts_are_distinct_balanced_and_of_8_to_24_words() -> None:
    assert len({text for text, _ in CORPUS}) == 6000
    assert sum(label for _, label in CORPUS) == 3000
    lengths = [len(text.split()) for text, _ in CORPUS]
    assert (min(lengths), max(lengths)) == (10, 24)
    assert all("  " not in text and " ." not in text for text, _ in CORPUS)


def test_texts_are_distinct_where_few_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("DETERMINERS", "MANNERS", "GENRES", "SUBJECTS", "PARTS", "JOINTS", "TAILS"):
        monkeypatch.setattr(generated, words, getattr(generated, words)[:1])
    assert len({text for text, _ in generated_corpus(1000, seed=0)}) == 1000


def test_labels_are_in_random_order() -> None:
    runs = sum(a.label != b.label for a, b in pairwise(CORPUS))
    assert abs(runs - 3000) < 200


def test_the_seed_decides() -> None:
    assert generated_corpus(40, seed=1) == generated_corpus(40, seed=1)
    assert not set(generated_corpus(40, seed=1)) & set(generated_corpus(40, seed=2))
    assert sum(label for _, label in generated_corpus(7, seed=1)) == 3


def test_the_words_tell_the_label_and_the_prompt_does_not() -> None:
    assert accuracy({text: words(text) for text, _ in CORPUS}) > 0.75
    assert accuracy({text: words(text)[:4] for text, _ in CORPUS}) < 0.54


def test_a_negation_turns_a_claim_round() -> None:
    def positive_rate(pattern: str) -> float:
        labels = [label for text, label in CORPUS if re.search(pattern, text)]
        return sum(labels) / len(labels)

    verbs, negations = "(is|feels|seems|remains)", "(not|never|hardly|far from)"
    bad, good = "(dull|hollow|lifeless|unbearable)", "(luminous|moving|gripping|tender)"
    assert positive_rate(f"{verbs} {bad}") < 0.3
    assert positive_rate(f"{negations} {bad}") > 0.65
    assert positive_rate(f"{verbs} {good}") > 0.7
    assert positive_rate(f"{negations} {good}") < 0.35


def test_a_corpus_reads_back(tmp_path: Path) -> None:
    corpus = CORPUS[:50]
    write_corpus(tmp_path / "new" / "folder", corpus)
    assert Counter(read_labelled(tmp_path / "new" / "folder")) == Counter(corpus)


def test_a_text_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line feed"):
        write_corpus(tmp_path, [LabelledText("one\ntwo", True)])
    assert not list(tmp_path.iterdir())
