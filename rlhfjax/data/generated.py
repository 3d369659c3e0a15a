"""A corpus with a hidden preference: film reviews from a small grammar.

A review opens with a film that says nothing about its worth, then makes two or three claims.
Each claim has a weight; "not", "hardly" and the like turn it round, "very" and "a little" scale
it. The hidden score is the sum of the claims and the label its sign, wrong in one text of twenty.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rlhfjax.data.text import DataError, LabelledText

LABEL_NOISE = 0.05
NUM_WORDS = range(8, 25)

DETERMINERS = ("the", "this", "his latest", "her second", "their new")
MANNERS = ("", "quiet", "animated", "black-and-white", "low-budget", "three-hour", "silent", "late")
GENRES = (
    "western",
    "thriller",
    "comedy",
    "drama",
    "documentary",
    "musical",
    "heist film",
    "war story",
    "romance",
    "ghost story",
    "road movie",
    "family saga",
)
SUBJECTS = (
    "",
    "about two brothers",
    "about a retired teacher",
    "about life at sea",
    "set in a mining town",
    "set on a night train",
    "from a first novel",
    "with an unknown cast",
    "shot in one winter",
    "by a former critic",
)
PARTS = (
    "the script",
    "the cast",
    "the young lead",
    "the score",
    "the final act",
    "the dialogue",
    "the camera work",
    "every scene",
    "the pacing",
    "the story",
)
ADJECTIVES = {
    "luminous": 1.0,
    "moving": 0.9,
    "gripping": 0.9,
    "tender": 0.8,
    "witty": 0.8,
    "clever": 0.7,
    "honest": 0.6,
    "charming": 0.6,
    "warm": 0.5,
    "fresh": 0.5,
    "likeable": 0.4,
    "watchable": 0.3,
    "slow": -0.3,
    "uneven": -0.4,
    "thin": -0.4,
    "noisy": -0.5,
    "stale": -0.6,
    "clumsy": -0.6,
    "shallow": -0.7,
    "tiresome": -0.8,
    "dull": -0.8,
    "hollow": -0.9,
    "lifeless": -0.9,
    "unbearable": -1.0,
}
DEEDS = {
    "wins you over": 0.9,
    "earns every tear": 0.8,
    "finds a rhythm of its own": 0.7,
    "rewards a patient audience": 0.6,
    "keeps its secrets well": 0.5,
    "raises an honest smile": 0.4,
    "outstays its welcome": -0.4,
    "borrows from better films": -0.5,
    "loses its way": -0.6,
    "falls flat": -0.8,
    "wastes a good idea": -0.8,
    "bores you to tears": -0.9,
}
DEGREES = {"": 1.0, "very": 1.4, "truly": 1.3, "rather": 0.8, "a little": 0.5}
NEGATIONS = {"not": -0.7, "never": -0.9, "hardly": -0.6, "far from": -0.8}
VERBS = ("is", "feels", "seems", "remains")
JOINTS = (", and", ", but", ", while", "; meanwhile", ", although")
TAILS = ("", "from start to finish", "for once", "by the end", "in its own way", "as ever")


def generated_corpus(num_texts: int, seed: int) -> list[LabelledText]:
    """Makes distinct reviews of 8 to 24 words, as many preferred as rejected ones.

    Args:
      num_texts: how many; of an odd number one more is rejected.
      seed: the same seed gives the same corpus.

    Returns:
      The texts in random order of labels.
    """
    rng = np.random.default_rng(seed)
    wanted = {True: num_texts // 2, False: num_texts - num_texts // 2}
    texts: dict[str, bool] = {}
    while any(wanted.values()):
        text, score = _review(rng)
        label = bool((score > 0) != (rng.random() < LABEL_NOISE))
        if len(text.split()) in NUM_WORDS and text not in texts and wanted[label]:
            texts[text] = label
            wanted[label] -= 1
    labelled = [LabelledText(text, label) for text, label in texts.items()]
    return [labelled[i] for i in rng.permutation(num_texts)]


def write_corpus(directory: Path, texts: Iterable[LabelledText]) -> None:
    """Writes `generated.pos` and `generated.neg`, which `text.read_labelled` reads.

    Args:
      directory: made if it does not exist; files of an earlier call are replaced.
      texts: texts of one line each.

    Raises:
      DataError: a text with a line feed, which would read back as two.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[bool, list[str]] = {True: [], False: []}
    for text, label in texts:
        if "\n" in text:
            raise DataError(f"{text!r} has a line feed; a text is one line, replace it")
        lines[label].append(f"{text}\n")
    (directory / "generated.pos").write_bytes("".join(lines[True]).encode())
    (directory / "generated.neg").write_bytes("".join(lines[False]).encode())


def _review(rng: np.random.Generator) -> tuple[str, float]:
    # Most claims lean one way, or the sum would hide what each of them adds.
    mood = 1 if rng.random() < 0.5 else -1
    film = _join(_pick(rng, DETERMINERS), _pick(rng, MANNERS), _pick(rng, GENRES))
    claim, score = _claim(rng, mood)
    text = _join(film, _pick(rng, SUBJECTS), claim)
    for _ in range(rng.integers(1, 3)):
        claim, weight = _claim(rng, mood)
        text = _join(text + _pick(rng, JOINTS), _pick(rng, PARTS), claim)
        score += weight
    return _join(text, _pick(rng, TAILS)) + ".", score


def _claim(rng: np.random.Generator, mood: int) -> tuple[str, float]:
    wanted = mood if rng.random() < 0.8 else -mood
    while True:
        words, weight = _any_claim(rng)
        if weight * wanted > 0:
            return words, weight


def _any_claim(rng: np.random.Generator) -> tuple[str, float]:
    if rng.random() < 0.3:
        deed = _pick(rng, tuple(DEEDS))
        return deed, DEEDS[deed]
    adjective = _pick(rng, tuple(ADJECTIVES))
    scales = NEGATIONS if rng.random() < 0.15 else DEGREES
    scale = _pick(rng, tuple(scales))
    return _join(_pick(rng, VERBS), scale, adjective), scales[scale] * ADJECTIVES[adjective]


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
