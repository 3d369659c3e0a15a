"""Conversations to texts, by the template of a model, which is a program that nobody vouches for.

Templates are Jinja, and run in its sandbox with the names and filters that transformers gives them.
They see JSON values and nothing else.  Jinja is imported when a template is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from rlhfjax.data.text import DataError

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""A template for models that come without one."""

# Code points that are no characters, so that no text has them.
_BEGIN, _END, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2 "
_MARKS = re.compile(f"[{_BEGIN}{_END}]")

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]


class ChatTemplate(NamedTuple):
    """How a model writes conversations.

    Attributes:
      source: the Jinja template.
      special_tokens: what the template may call by name: `bos_token`, `eos_token`, ….
    """

    source: str
    special_tokens: Mapping[str, str] = {}

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` gives it.

        Args:
          messages: with `role` and `content`.
          add_generation_prompt: ends with what opens a turn of the assistant.
          continue_final_message: ends with the last word of the last message, for the model to go
            on from there.
          tools: JSON schemas of functions.
          variables: what else the template reads, such as `enable_thinking`.

        Returns:
          The text.

        Raises:
          DataError: the template refuses the messages, does what the sandbox forbids, or is wrong.
        """
        variables |= {"add_generation_prompt": add_generation_prompt, "tools": tools}
        if not continue_final_message:
            return _MARKS.sub("", self._marked(messages, variables))
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise DataError("there is no text in a last message to go on from")
        last = {**messages[-1], "content": messages[-1]["content"] + _BREAK}
        text = _MARKS.sub("", self._marked([*messages[:-1], last], variables))
        end = text.rfind(_BREAK.strip())
        if end < 0:
            raise DataError("the chat template does not show the last message, to go on from it")
        # A template that trims messages has trimmed what stood before the mark in this one, too.
        return text[:end] if text.startswith(_BREAK, end) else text[:end].rstrip()

    def assistant_spans(self, messages: Messages, **variables: Any) -> tuple[str, Spans]:
        """The text of a conversation, and the parts of it that the assistant is to write.

        They are what the template encloses in `{% generation %}` and `{% endgeneration %}`. Of a
        template without these it is what every message of the assistant adds to the text behind
        the generation prompt, the end of its turn included.

        Args:
          messages: with `role` and `content`.
          variables: what else the template reads.

        Returns:
          The text, and beginning and end of each part.

        Raises:
          DataError: as `render`; the template has no such tags, and the text of the first messages
            is not the first part of the text of all.
        """
        marked = self._marked(messages, {"add_generation_prompt": False, "tools": None} | variables)
        text = _MARKS.sub("", marked)
        if re.search(r"{%[-+]?\s*generation\b", self.source):
            # Every mark before a mark has moved it by one.
            places = [mark.start() - n for n, mark in enumerate(_MARKS.finditer(marked))]
            return text, list(zip(places[::2], places[1::2], strict=True))
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:number], add_generation_prompt=True, **variables)
                behind = self.render(messages[: number + 1], **variables)
                if not (text.startswith(behind) and behind.startswith(before)):
                    raise DataError(
                        f"the text up to message {number + 1} changes with what follows, so that "
                        "nobody knows what the assistant wrote: enclose that in "
                        "{% generation %} … {% endgeneration %} in the chat template"
                    )
                spans.append((len(before), len(behind)))
        return text, spans

    def _marked(self, messages: Messages, variables: Mapping[str, Any]) -> str:
        """The text with marks around the parts of the assistant."""
        given = json.dumps({"messages": messages, **variables}, ensure_ascii=False)
        if _MARKS.search(given):
            raise DataError("a message has U+FDD0 or U+FDD1, which are no characters: remove them")
        try:
            template = _compiled(self.source)
            return template.render({**self.special_tokens, **json.loads(given)})
        except ImportError as error:
            raise DataError(
                "chat templates need jinja2: pip install 'rlhfjax[pretrained]'"
            ) from error
        except Exception as error:  # a template can fail in as many ways as a program
            raise DataError(f"chat template: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what the assistant writes puts a mark at either end."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja wants it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
            return nodes.Scope([begin, *body, end], lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names by which a value could pass for another type."""

        def __init__(self, *args: Any, **values: Any) -> None:
            super().__init__(*args, **values)
            for name in dict(*args, **values):
                _refuse_underscore(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} in a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment.from_string(source)
