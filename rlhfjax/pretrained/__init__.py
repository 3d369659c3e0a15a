"""Models in the Hugging Face layout: loaded from a directory, and saved to one."""

from rlhfjax.pretrained.directory import (
    Pretrained,
    gives_scores,
    init,
    load,
    load_scalar,
    save,
    save_scalar,
    score_head,
)
from rlhfjax.pretrained.families import Architecture, UnsupportedError, architecture
from rlhfjax.pretrained.reading import DirectoryError
from rlhfjax.pretrained.tokenizer import Tokenizer

__all__ = [
    "Architecture",
    "DirectoryError",
    "Pretrained",
    "Tokenizer",
    "UnsupportedError",
    "architecture",
    "gives_scores",
    "init",
    "load",
    "load_scalar",
    "save",
    "save_scalar",
    "score_head",
]
