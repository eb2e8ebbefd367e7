"""Chat templates: what they may use, what is refused, and what transformers renders of them."""
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shardlib.models.files.chat_template import ChatTemplate
from shardlib.models.files.checkpoint import CheckpointError


@pytest.mark.parametrize("source, message", [
    ("{% for %}", "the chat template is not valid: Expected an expression, got 'end of statement block'"),
    ("x" * 100_001, "the chat template is no text of at most 100000 characters"),
    (["x"], "the chat template is no text of at most 100000 characters"),
    ("{{ raise_exception('roles must alternate') }}", "the chat template failed: roles must alternate"),
    ("{{ messages.__class__.__mro__ }}",
     "the chat template failed: access to attribute '__class__' of 'list' object is unsafe."),
    ("{{ messages.append(1) }}",
     "the chat template failed: access to attribute 'append' of 'list' object is unsafe."),
    ("{% for i in range(10**9) %}{% endfor %}",
     "the chat template failed: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
    ("{{ 1 // 0 }}", "the chat template failed: integer division or modulo by zero"),
])
def test_templates_that_are_refused(source, message):
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source, {}).render([])
    assert str(caught.value) == message


def test_messages_that_are_none():
    template = ChatTemplate("{{ messages }}", {})
    for message in ({"role": "user"}, {"role": "user", "content": 3}, {"content": "x"}):
        with pytest.raises(CheckpointError) as caught:
            template.render([message])
        assert str(caught.value) == (
            f"a message of a chat has a text as role and a text as content; this one is {message}")


def test_what_templates_may_use():
    source = ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
              "{% endfor %}{{ strftime_now('%Y') | length }}")
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "é<"}] * 2) == (
        '{"role": "user", "content": "é<"}4')


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ("{% for m in messages -%}\n  {%- generation -%}\n {{ loop.index }} {{ m.role }} {% endgeneration %} x\n"
     "{% endfor %}"),
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}",
    ("{% if tools is not none %}tools{% endif %}{% if documents is defined and documents %}"
     "documents{% endif %}"),
    ("{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}"
     "{{ messages | tojson(ensure_ascii=True) }}"),
    "{{ bos_token }}{{ sep_token }}{% if add_generation_prompt %}a{% endif %}{{ unknown }}",
])
def test_templates_render_as_in_transformers(source):
    messages, tokens = ([{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": "b"}],
                        {"bos_token": "<s>", "sep_token": "|"})
    (theirs,), _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True,
                                         **tokens)
    assert ChatTemplate(source, tokens).render(messages) == theirs
