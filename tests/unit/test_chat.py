"""Chat templates render as transformers renders them, and fail with a typed error."""

from __future__ import annotations

from typing import Literal

import pytest

from shared.errors import InvalidQuery, UnsupportedModel
from shared.messages import ChatMessage
from shared.models.chat import render
from tests.tiny import CHAT_TEMPLATE


def say(content: str, role: Literal["system", "user", "assistant"] = "user") -> ChatMessage:
    return ChatMessage(role=role, content=content)


def test_a_template_of_the_usual_kind() -> None:
    """Each turn is wrapped, and the model's turn is opened at the end unless that is declined."""
    messages = [say("Be brief.", "system"), say("Hi")]
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHAT_TEMPLATE, messages) == f"{turns}<|im_start|>assistant\n"
    assert render(CHAT_TEMPLATE, messages, add_generation_prompt=False) == turns


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>a<b></s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% break %}{% endif %}{% endfor %}", "a<b>"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "a<b>!"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages[0].content.strip() | length }}{{ tools is none }}", "4True"),
    ],
)
def test_what_templates_rely_on(template: str, expected: str) -> None:
    """Trimmed blocks, JSON without HTML escapes, loop controls, generation marks and the current time all work."""
    assert render(template, [say("a<b>"), say("second")], "<s>", "</s>") == expected


def test_a_model_without_a_template_gets_plain_turns() -> None:
    """Roles and contents stand on lines of their own, and the last line is the model's to continue."""
    assert render("", [say("Hi")]) == "user: Hi\nassistant:"


def test_a_refusal_is_the_callers_mistake() -> None:
    """What the template refuses comes back as an invalid query with the template's words."""
    with pytest.raises(InvalidQuery, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [say("Hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ missing.field }}",
    ],
)
def test_a_broken_or_hostile_template_is_the_models_fault(template: str) -> None:
    """A template that fails, changes its input or reaches for Python's insides is refused."""
    with pytest.raises(UnsupportedModel, match="chat template fails"):
        render(template, [say("Hi")])
