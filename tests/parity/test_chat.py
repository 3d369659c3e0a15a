"""Chat templates against transformers: texts, refusals, and the tokens of the assistant."""

import numpy as np
import pytest

from rlhfjax.data import tokenized
from rlhfjax.data.chat import CHATML, ChatTemplate
from rlhfjax.data.formats import Text
from rlhfjax.data.text import DataError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
jinja2 = pytest.importorskip("jinja2")

# In the manner of the public ones, with all that they ask of Jinja.
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" + system }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{{- eos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- "<|header|>assistant<|/header|>\\n\\n" }}
        {%- generation %}
            {{- message.content | trim + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- "<|header|>" + message.role + "<|/header|>\\n\\n" }}
        {{- message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|header|>assistant<|/header|>\\n\\n" }}
{%- endif %}
""",
    "Gemma": """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% set role = 'model' if message.role == 'assistant' else message.role %}
    {{ '<turn>' + role + '\\n' }}{% if role == 'model' %}{% generation %}\
{{ message.content | trim }}<end>{% endgeneration %}{% else %}{{ message.content | trim }}\
<end>{% endif %}
{{ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
""",
    "Mistral": """\
{%- set ns = namespace(first=true) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if message['role'] == 'user' %}
        {%- if ns.first and messages[0]['role'] == 'system' %}
            {{- '[INST] ' + messages[0]['content'] + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
        {%- set ns.first = false %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('an unknown role: ' ~ dict(role=message['role']) | tojson) }}
    {%- endif %}
{%- endfor %}
""",
}
SYSTEM, USER, ANSWER, MORE, END = (
    {"role": role, "content": content}
    for role, content in [
        ("system", "Be <brief> & kind."),
        ("user", " Où est-il ?\n"),
        ("assistant", "Là: {{ 1 }}, \U0001f600 \n"),
        ("user", "And?"),
        ("assistant", "Nothing."),
    ]
)
CHATS = {
    "question": [USER],
    "system": [SYSTEM, USER, ANSWER, MORE],
    "turns": [USER, ANSWER, MORE, END],
    "not in turns": [USER, MORE],
    "another role": [{"role": "tool", "content": "3"}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def theirs():
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL.values()))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


class Ours:
    end_tokens = ()

    def __init__(self, theirs) -> None:
        self.backend = theirs.backend_tokenizer

    def encode(self, texts, *, add_special_tokens):
        given = {"add_special_tokens": add_special_tokens}
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), **given)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"tools": [{"name": "é<", "parameters": {"b": 1, "a": [None, True]}}]},
    ],
    ids=["plain", "prompt", "go on", "tools"],
)
def test_texts_and_refusals(theirs, template: str, chat: str, options: dict) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]

    def of_theirs() -> str | None:
        try:
            return theirs.apply_chat_template(
                messages, chat_template=source, tokenize=False, **options
            )
        except (ValueError, jinja2.TemplateError):
            return None

    def of_ours() -> str | None:
        try:
            return ChatTemplate(source, SPECIAL).render(messages, **options)
        except DataError:
            return None

    assert of_ours() == of_theirs()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", ["turns", "question"])
def test_tokens_of_the_assistant(theirs, template: str, chat: str) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]
    expected = theirs.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learned, _ = tokenized.assistant_tokens(
        Text(text=messages), Ours(theirs), ChatTemplate(source, SPECIAL)
    )
    assert learned.tokens == expected["input_ids"]
    np.testing.assert_array_equal(learned.learned, np.array(expected["assistant_masks"], bool))
    assert any(learned.learned) == (chat == "turns")


def test_the_time_now(theirs) -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    expected = theirs.apply_chat_template([USER], chat_template=source, tokenize=False)
    assert ChatTemplate(source).render([USER]) == expected
