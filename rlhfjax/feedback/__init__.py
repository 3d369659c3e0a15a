"""Feedback beyond labels: principles that a model applies, and people who differ.

A constitution is a YAML file (`principles`), its texts are filled in within a compiled step
(`templates`), any `LanguageModel` judges by the log-probabilities of its answers (`judgement`), and
what it says becomes data to learn from, and to be audited by a person (`stages`).

Everybody prefers something else: users on one shared model learn in one program (`people`), from
the pairs of which the answer is worth most (`choice`).
"""

from rlhfjax.feedback import choice, judgement, people, principles, stages, templates

__all__ = ["choice", "judgement", "people", "principles", "stages", "templates"]
