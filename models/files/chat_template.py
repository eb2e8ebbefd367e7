"""The chat template of a model: a Jinja program that came with its weights, run in a sandbox.

>>> template = ChatTemplate("{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}",
...                         {"bos_token": "<s>"})
>>> template.render([{"role": "user", "content": "Hi"}])
'<s>Hi'

The template sees what Hugging Face transformers shows to templates: `messages`, `add_generation_prompt`,
`tools` and `documents` (none), the special tokens, `raise_exception`, `strftime_now`, the filter `tojson`;
the tags `{% generation %}` and `{% endgeneration %}`, which say to a trainer what the model wrote, render
what is between them. The sandbox keeps it from attributes of Python's own, and from changing what it is
given; it does not bound the time that a template takes. A template is compiled when a chat needs it. Refused
with a `CheckpointError`, then: templates of more than 100,000 characters, and whatever goes wrong while one
is compiled or runs.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shardlib.models.files.checkpoint import CheckpointError

MAX_TEMPLATE = 100_000      # characters; the longest in use are near 20,000


class ChatTemplate:
    """A template and the special tokens that it may name: "bos_token", "eos_token" and so on."""

    def __init__(self, source: Any, tokens: Mapping[str, str]) -> None:
        self.source, self.tokens = source, dict(tokens)

    @cached_property
    def template(self) -> jinja2.Template:
        if not isinstance(self.source, str) or len(self.source) > MAX_TEMPLATE:
            raise CheckpointError(f"the chat template is no text of at most {MAX_TEMPLATE} characters")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise,
                                   strftime_now=lambda format: datetime.now().strftime(format))
        try:
            return environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of the messages, each with a "role" and a "content";
        then, if asked for, the beginning of the answer."""
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise CheckpointError("a message of a chat has a text as role and a text as content; this "
                                      f"one is {message!r:.200}")
        template = self.template
        try:
            return template.render(
                {**self.tokens, "messages": [dict(m) for m in messages], "tools": None, "documents": None,
                 "add_generation_prompt": add_generation_prompt})
        except Exception as error:      # a template is a program: it may raise anything
            raise CheckpointError(f"the chat template failed: {error}") from None


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what is between, with names of its own,
    as in transformers."""
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True),
                                  lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
