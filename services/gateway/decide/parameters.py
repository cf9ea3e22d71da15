"""OpenAI's request parameters: those taken over, those that make no difference, those refused, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidQuery, Unsupported

PASSED_ON = ("temperature", "top_p", "top_k", "seed", "metadata")
"""Of the same name and meaning in our query."""

IGNORED = frozenset({
    "user", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "prediction",
    "parallel_tool_calls",
})  # fmt: skip
"""They change nothing that a client reads in its answer."""

EXTENSIONS = (
    "id", "preference", "constraints", "deadline_s", "priority", "retries", "expect", "cascade",
)  # fmt: skip
"""Fields of `calm`: those of our query that OpenAI's JSON has no name for."""

_TOOLS = "Describe the tools in the messages, and read the call out of the answer (`calm.expect` can ask for JSON)."
_PENALTY = "Leave it out: sampling here has `temperature`, `top_p`, `top_k` and `seed`."
_LOGPROBS = "Leave it out; `calm.confidence` of the answer has the mean and lowest log-probability."

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((None, 1), "Leave it out, and send the request several times with other seeds."),
    "best_of": ((None, 1), "Leave it out, and send the request several times with other seeds."),
    "tools": ((None, []), _TOOLS),
    "tool_choice": ((None, "none", "auto"), _TOOLS),
    "functions": ((None, []), _TOOLS),
    "function_call": ((None, "none", "auto"), _TOOLS),
    "logprobs": ((None, False, 0), _LOGPROBS),
    "top_logprobs": ((None, 0), _LOGPROBS),
    "logit_bias": ((None, {}), _PENALTY),
    "presence_penalty": ((None, 0), _PENALTY),
    "frequency_penalty": ((None, 0), _PENALTY),
    "repetition_penalty": ((None, 1), _PENALTY),
    "min_p": ((None, 0), _PENALTY),
    "modalities": ((None, ["text"]), "Leave it out: answers are text."),
    "audio": ((None,), "Leave it out: answers are text."),
    "web_search_options": ((None,), "Put what was found into the messages."),
    "reasoning_effort": ((None, "none"), "Leave it out; `calm.preference` weighs quality against time and energy."),
    "verbosity": ((None, "medium"), "Say in the messages how long the answer shall be, or set `max_tokens`."),
    "suffix": ((None, ""), "Say in the prompt what follows the text."),
    "echo": ((None, False), "Leave it out, and put the prompt before the answer yourself."),
}
"""By name: the values that change nothing, and what to do instead of any other."""


def check(body: Mapping[str, Any], handled: tuple[str, ...]) -> None:
    """Refuse what would change the answer and is not understood; `handled` are parameters that the caller looks at.

    Raises:
        Unsupported: names the parameter and what to do.
    """
    for name, value in body.items():
        if name in handled or name in IGNORED or name in PASSED_ON:
            continue
        if name not in REFUSED:
            raise Unsupported(
                f"The parameter `{name}` is not known here.",
                "Leave it out, or correct its name; docs/http.md lists all. Our own stand in the object `calm`.",
                field=name,
            )
        neutral, remedy = REFUSED[name]
        if not any(value == one and (value is None) == (one is None) for one in neutral):
            raise Unsupported(f"The parameter `{name}` is not supported.", remedy, field=name)


def extensions(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object `calm` of a request, as fields of our query.

    Raises:
        InvalidQuery: not an object.
        Unsupported: a field that it does not have.
    """
    given = body.get("calm")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidQuery("`calm` is not an object.", f"It holds {', '.join(EXTENSIONS)}.", field="calm")
    for name in given:
        if name not in EXTENSIONS:
            raise Unsupported(
                f"`calm.{name}` is not known.", f"`calm` holds {', '.join(EXTENSIONS)}.", field=f"calm.{name}"
            )
    return {name: value for name, value in given.items() if value is not None}
