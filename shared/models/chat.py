"""Renders chat templates (Jinja, sandboxed) the way model authors write them for transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidQuery, UnsupportedModel
from shared.messages import ChatMessage

_PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models that come without a template."""


def render(
    template: str,
    messages: Sequence[ChatMessage],
    bos_token: str = "",
    eos_token: str = "",
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the text that the model continues.

    Raises:
        InvalidQuery: the template refuses the conversation (roles that must alternate, say).
        UnsupportedModel: the template itself does not work.
    """
    try:
        return _compiled(template or _PLAIN).render(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            tools=None,  # these two are given by transformers too, and templates ask whether they are none
            documents=None,
        )
    except _Refused as error:
        raise InvalidQuery(f"The model's chat template says: {error}.", "Change the roles of `messages`.") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UnsupportedModel(f"The model's chat template fails: {error}.", "Replace chat_template.jinja.") from None


class _Refused(Exception):
    pass


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 declared like this by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(template)
