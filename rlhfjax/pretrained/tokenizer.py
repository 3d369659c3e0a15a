"""Texts to tokens and back, by the files that a model directory has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhfjax.pretrained.reading import DirectoryError, parsed

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
SLOW = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json",
    "merges.txt", "vocab.txt",
)  # fmt: skip
FILES = (TOKENIZER, SETTINGS, SPECIAL, "added_tokens.json", TEMPLATE, GENERATION, *SLOW)


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the directory says of its tokens.

    Attributes:
      backend: the `tokenizers.Tokenizer`, without truncation and padding.
      pad_token: what stands where a row has no token; the first end token where the directory
        names no other, as in TRL.
      end_tokens: after which a response is over; the tokenizer's own, which ends the texts that a
        model is taught, comes first.
      begin_token: what a text begins with, or None.
      special_tokens: name → text, such as "bos_token" → "<s>", for chat templates.
      chat_template: Jinja source, or None.
    """

    backend: Any
    pad_token: int
    end_tokens: tuple[int, ...]
    begin_token: int | None
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those added later included; the model may have room for more."""
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Texts to tokens.

        Args:
          texts: any number of them.
          add_special_tokens: what the tokenizer puts before and after a text, such as a begin
            token; False where the text has them, as after a chat template.

        Returns:
          the tokens of each text.
        """
        found = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(
        self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = True
    ) -> list[str]:
        """Tokens to texts.

        Args:
          rows: the tokens of each text.
          skip_special_tokens: leaves out pads, ends and the like.

        Returns:
          the texts.
        """
        rows = [[int(token) for token in row] for row in rows]
        return self.backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)


def tokenizer(files: Mapping[str, bytes], config: Mapping[str, Any], *, where: str) -> Any:
    """The tokenizer of a directory.

    Pad, end and begin tokens are those that `tokenizer_config.json` or `special_tokens_map.json`
    name. `generation_config.json`, or `config.json` where that says nothing, adds further end
    tokens and stands in for what is not named.

    Args:
      files: name → content, of `FILES`.
      config: the parsed `config.json`.
      where: the directory, for messages.

    Returns:
      a `Tokenizer`, or None where the directory has none.

    Raises:
      DirectoryError: it is of the slow kind only, its files contradict each other, or there is
        neither a pad nor an end token.
      ImportError: `tokenizers` is not installed.
    """
    if TOKENIZER not in files:
        slow = [name for name in SLOW if name in files]
        if slow:
            raise DirectoryError(
                f"{where}: {slow[0]} without {TOKENIZER} is a tokenizer of the slow kind; "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes "
                f"{TOKENIZER}"
            )
        return None
    backend = _backend(files[TOKENIZER], where)
    settings = _object(files, SETTINGS, where)
    if "auto_map" in settings:
        raise DirectoryError(
            f"{where}/{SETTINGS}: auto_map asks for code that comes with the model, and such code "
            "is never run"
        )
    special = _special_tokens(_object(files, SPECIAL, where)) | _special_tokens(settings)
    tokens = {name: backend.token_to_id(text) for name, text in special.items()}
    for name in ("pad_token", "eos_token", "bos_token"):
        if name in special and tokens[name] is None:
            raise DirectoryError(
                f"{where}: {name} is {special[name]!r}, which {TOKENIZER} does not have"
            )
    generation = _object(files, GENERATION, where)

    def ids(name: str) -> list[int]:
        said = generation.get(name)
        said = config.get(name) if said is None else said
        said = said if isinstance(said, list) else [said]
        return [token for token in said if type(token) is int and token >= 0]

    ends = [tokens["eos_token"]] if "eos_token" in tokens else []
    ends = list(dict.fromkeys(ends + ids("eos_token_id")))
    pads = [tokens["pad_token"]] if "pad_token" in tokens else ids("pad_token_id") + ends
    begins = [tokens["bos_token"]] if "bos_token" in tokens else ids("bos_token_id")
    if not pads:
        raise DirectoryError(
            f"{where}: names neither a pad_token nor an eos_token: add one to {SETTINGS}"
        )
    return Tokenizer(
        backend,
        pads[0],
        tuple(ends),
        begins[0] if begins else None,
        special,
        chat_template(files, where=where),
    )


def chat_template(files: Mapping[str, bytes], *, where: str) -> str | None:
    """The Jinja source of the chat template: of its own file, else the one in the settings.

    Args:
      files: name → content, of `FILES`.
      where: the directory, for messages.

    Returns:
      the source, or None where there is none; of several the one that is called "default".
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8")
    found = _object(files, SETTINGS, where).get("chat_template")
    if isinstance(found, list):
        by_name = {template["name"]: template["template"] for template in found}
        found = by_name.get("default")
    return found


def _backend(content: bytes, where: str) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ImportError(
            f"{where} has a tokenizer, for which: pip install 'rlhfjax[pretrained]'"
        ) from error
    try:
        backend = Backend.from_str(content.decode("utf-8"))
    except Exception as error:
        raise DirectoryError(f"{where}/{TOKENIZER}: cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    return parsed(f"{where}/{name}", files[name]) if name in files else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name → text, which may be wrapped in an object that says how it is cut off."""
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}
