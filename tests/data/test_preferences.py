from collections import Counter

import pytest

from rlhfjax.data.preferences import pair_by_label
from rlhfjax.data.text import DataError, LabelledText

GOOD = [LabelledText(f"good {i}", True) for i in range(50)]
BAD = [LabelledText(f"bad {i}", False) for i in range(50)]


def test_a_preferred_text_is_chosen_over_a_rejected_one_and_each_occurs_once() -> None:
    pairs = pair_by_label(GOOD + BAD, seed=0)
    assert Counter(p.chosen for p in pairs) == Counter(t.text for t in GOOD)
    assert Counter(p.rejected for p in pairs) == Counter(t.text for t in BAD)


@pytest.mark.parametrize("short", ["chosen", "rejected"])
def test_the_shorter_side_is_passed_over_again(short: str) -> None:
    texts = GOOD[:7] + BAD[:3] if short == "rejected" else GOOD[:3] + BAD[:7]
    drawn = [getattr(p, short) for p in pair_by_label(texts, seed=0)]
    assert len(drawn) == 7
    assert len(set(drawn[:3])) == len(set(drawn[3:6])) == 3


def test_the_seed_decides() -> None:
    first, again, other = (pair_by_label(GOOD + BAD, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert {p.chosen for p in first} == {p.chosen for p in other}


def test_pairs_follow_no_order_of_the_input() -> None:
    pairs = pair_by_label(GOOD + BAD, seed=0)
    assert sum(p.chosen.split()[1] == p.rejected.split()[1] for p in pairs) < 8
    assert [p.chosen for p in pairs] != [t.text for t in GOOD]


@pytest.mark.parametrize("texts", [GOOD, BAD, []])
def test_both_labels_are_needed(texts: list[LabelledText]) -> None:
    with pytest.raises(DataError, match="texts of both labels"):
        pair_by_label(texts, seed=0)
