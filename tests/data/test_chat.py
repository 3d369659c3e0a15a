"""Chat templates: the text, the parts of the assistant, and what a template must not do."""

import sys

import pytest

from rlhfjax.data import chat
from rlhfjax.data.chat import CHATML, ChatTemplate
from rlhfjax.data.text import DataError

pytest.importorskip("jinja2")

USER, AGAIN = ({"role": "user", "content": text} for text in ("Hi", "Why?"))
ANSWER, REASON = ({"role": "assistant", "content": text} for text in (" Hello ", "So."))
CHAT = [USER, ANSWER, AGAIN, REASON]
# Without the tag that says what the assistant writes.
PLAIN = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    {"bos_token": "<s>", "eos_token": "</s>"},
)


def parts(template: ChatTemplate, messages, **variables) -> list[str]:
    text, spans = template.assistant_spans(messages, **variables)
    assert text == template.render(messages, **variables)
    return [text[begin:end] for begin, end in spans]


def test_chatml_by_hand() -> None:
    assert ChatTemplate(CHATML).render(CHAT[:2], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_tools_and_further_variables() -> None:
    template = ChatTemplate(
        "{{ bos_token }}|{{ tools | tojson }}|{{ thinking }}|{{ unk_token }}", {"bos_token": "<s>"}
    )
    tools = [{"name": "<é>"}]
    assert template.render([], tools=tools, thinking=True) == '<s>|[{"name": "<é>"}]|True|'
    assert template.render([]) == "<s>|null||"


def test_what_the_assistant_writes_by_the_tag() -> None:
    assert parts(ChatTemplate(CHATML), CHAT) == [" Hello <|im_end|>", "So.<|im_end|>"]


def test_what_the_assistant_writes_by_what_its_turns_add() -> None:
    assert parts(PLAIN, CHAT) == [" Hello </s>", "So.</s>"]


def test_a_template_that_writes_the_past_anew_does_not_tell_who_wrote_what() -> None:
    last_only = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{% if loop.last %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="up to message 2 changes with what follows"):
        last_only.assistant_spans(CHAT)


def test_the_last_message_is_gone_on_with() -> None:
    go_on = {"continue_final_message": True}
    assert PLAIN.render(CHAT[:2], **go_on) == "<s>[user]Hi</s>[assistant] Hello "
    trimming = ChatTemplate(PLAIN.source.replace("m.content", "m.content | trim"))
    assert trimming.render(CHAT[:2], **go_on) == "[user]Hi[assistant]Hello"
    with pytest.raises(DataError, match="no text in a last message"):
        PLAIN.render([], **go_on)
    with pytest.raises(DataError, match="does not show the last message"):
        ChatTemplate("nothing").render(CHAT, **go_on)


def test_messages_stay_as_they_are() -> None:
    messages = [dict(message) for message in CHAT]
    PLAIN.render(messages, continue_final_message=True)
    assert messages == CHAT


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set n = namespace(__html__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ self._TemplateReference__context.environment.loader.x }}",
    ],
)
def test_the_sandbox_refuses(attack: str) -> None:
    with pytest.raises(DataError, match="chat template: "):
        ChatTemplate(attack).render(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[9].content }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_says_why(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source).render(CHAT)


def test_a_text_that_could_pass_for_a_mark_is_refused() -> None:
    with pytest.raises(DataError, match=r"U\+FDD0"):
        PLAIN.render([{"role": "user", "content": "\ufdd0"}])


def test_without_jinja_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chat._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DataError, match=r"pip install 'rlhfjax\[pretrained\]'"):
        PLAIN.render(CHAT)
