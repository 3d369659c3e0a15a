"""Tokenizers of model directories: what pads, ends and begins, whoever says it."""

import json
from typing import Any

import pytest

from rlhfjax.pretrained.reading import DirectoryError
from rlhfjax.pretrained.tokenizer import Tokenizer, chat_template, tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|end|>", "a", "b", "c"]
UNK, BEGIN, END, PAD, TURN, A, B, C = range(8)


def backend() -> Any:
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[:5])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    made.enable_truncation(2)
    made.enable_padding(pad_id=PAD, pad_token="<pad>")
    return made


JSON = backend().to_str().encode()
NAMED = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}


def read(config: Any = None, **files: Any) -> Tokenizer:
    """Of a directory with these files, whose names end with .json."""
    contents = {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return tokenizer({"tokenizer.json": JSON, **contents}, config or {}, where="here")


def tokens(found: Tokenizer) -> tuple[int, tuple[int, ...], int | None]:
    return found.pad_token, found.end_tokens, found.begin_token


class TestTexts:
    def test_are_encoded_whole_and_alone_whatever_the_file_says(self) -> None:
        found = read(tokenizer_config=NAMED)
        assert found.encode(["a b c", "a"]) == [[BEGIN, A, B, C], [BEGIN, A]]
        assert found.encode(["a b", ""], add_special_tokens=False) == [[A, B], []]

    def test_come_back_without_special_tokens_or_with_them(self) -> None:
        found = read(tokenizer_config=NAMED)
        rows = [[BEGIN, A, B, END, PAD], [C]]
        assert found.decode(rows) == ["a b", "c"]
        assert found.decode(rows, skip_special_tokens=False) == ["<s> a b </s> <pad>", "c"]

    def test_are_of_so_many_tokens(self) -> None:
        assert read(tokenizer_config=NAMED).vocab_size == len(WORDS)


class TestTokens:
    def test_are_those_that_the_settings_name(self) -> None:
        assert tokens(read(tokenizer_config=NAMED)) == (PAD, (END,), BEGIN)

    def test_may_be_objects(self) -> None:
        wrapped = {name: {"content": text, "lstrip": False} for name, text in NAMED.items()}
        found = read(special_tokens_map=wrapped, tokenizer_config={"add_bos_token": True})
        assert tokens(found) == (PAD, (END,), BEGIN)
        assert found.special_tokens == NAMED

    def test_of_the_settings_come_before_those_of_the_map_unless_null(self) -> None:
        settings = {"eos_token": "<|end|>", "pad_token": None}
        found = read(special_tokens_map=NAMED, tokenizer_config=settings)
        assert tokens(found) == (PAD, (TURN,), BEGIN)

    def test_that_end_are_those_of_generation_too_after_the_own_one(self) -> None:
        found = read(tokenizer_config=NAMED, generation_config={"eos_token_id": [TURN, END]})
        assert found.end_tokens == (END, TURN)

    def test_of_generation_come_before_those_of_the_model(self) -> None:
        config = {"eos_token_id": C, "bos_token_id": C, "pad_token_id": C}
        generation = {"eos_token_id": TURN, "bos_token_id": BEGIN, "pad_token_id": PAD}
        assert tokens(read(config, generation_config=generation)) == (PAD, (TURN,), BEGIN)
        assert tokens(read(config)) == (C, (C,), C)

    def test_that_end_pad_where_nothing_else_does(self) -> None:
        found = read({"pad_token_id": -1}, tokenizer_config={"eos_token": "</s>"})
        assert tokens(found) == (END, (END,), None)

    def test_that_pad_are_needed(self) -> None:
        with pytest.raises(DirectoryError, match="here: names neither a pad_token nor"):
            read()

    @pytest.mark.parametrize("name", NAMED)
    def test_that_the_tokenizer_lacks_are_refused(self, name: str) -> None:
        with pytest.raises(DirectoryError, match=f"here: {name} is '<no>'"):
            read(tokenizer_config={**NAMED, name: "<no>"})


class TestTemplates:
    def test_are_a_file_or_a_setting(self) -> None:
        settings = {"tokenizer_config.json": json.dumps({"chat_template": "setting"}).encode()}
        assert chat_template(settings, where="") == "setting"
        assert chat_template({**settings, "chat_template.jinja": b"file"}, where="") == "file"
        assert chat_template({}, where="") is None

    def test_are_the_default_of_several(self) -> None:
        several = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain"},
        ]
        assert read(tokenizer_config={**NAMED, "chat_template": several}).chat_template == "plain"


class TestFiles:
    def test_may_lack_a_tokenizer(self) -> None:
        assert tokenizer({"generation_config.json": b"{}"}, {}, where="here") is None

    @pytest.mark.parametrize("slow", ["tokenizer.model", "vocab.json"])
    def test_of_the_slow_kind_alone_are_refused_with_advice(self, slow: str) -> None:
        with pytest.raises(DirectoryError, match=rf"here: {slow} .*AutoTokenizer"):
            tokenizer({slow: b""}, {}, where="here")

    def test_that_ask_for_code_are_refused(self) -> None:
        with pytest.raises(DirectoryError, match=r"here/tokenizer_config.json: auto_map"):
            read(tokenizer_config={**NAMED, "auto_map": {"AutoTokenizer": ["x.Y", None]}})

    def test_that_are_none_are_refused(self) -> None:
        with pytest.raises(DirectoryError, match=r"here/tokenizer.json: cannot be read"):
            tokenizer({"tokenizer.json": b"{}"}, {}, where="here")
        with pytest.raises(DirectoryError, match=r"here/tokenizer_config.json: "):
            tokenizer({"tokenizer.json": JSON, "tokenizer_config.json": b"["}, {}, where="here")
