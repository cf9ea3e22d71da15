"""`python -m shared.describe > docs/subjects.md`: the reference of subjects and messages, from the code itself."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from typing import Any

import msgspec

from shared import messages, streams, subjects

HEAD = """# Subjects and messages

Made from the code by `python -m shared.describe`; a test checks that it is current.

Public messages are JSON, or MessagePack when the `Content-Type` header says `application/msgpack`; the reply comes in
the same encoding. Internal messages are MessagePack. `type` names a message and its version. Times are Unix seconds,
durations seconds (`_s`), energy joules (`_j`), sizes bytes (`_bytes`).
"""


def document() -> str:
    """The whole page as Markdown."""
    lines = [HEAD, "## Subjects", "", "| subject | kind | message | from | to |", "|---|---|---|---|---|"]
    for e in subjects.CATALOGUE:
        names = ", ".join(f"[{tag(t) or t.__name__}](#{t.__name__.lower()})" for t in e.message) or "empty"
        note = f" ({e.note})" if e.note else ""
        lines.append(f"| `{e.pattern}` | {e.kind}{note} | {names} | {e.sender} | {e.receiver} |")
    lines += ["", "## Streams and buckets", "", "| name | subjects | kept |", "|---|---|---|"]
    for s in streams.STREAMS:
        kept = f"{s.max_age:g} s" if s.max_age else "until acknowledged"
        lines.append(f"| `{s.name}` | `{', '.join(s.subjects or [])}` | {kept} |")
    for b in streams.BUCKETS:
        lines.append(f"| KV `{b.bucket}` | | {f'{b.ttl:g} s after the last refresh' if b.ttl else 'for ever'} |")
    lines += ["", "## Messages", ""]
    for kind in kinds():
        lines += describe(kind)
    return "\n".join(lines).rstrip() + "\n"


def kinds() -> list[type[msgspec.Struct]]:
    """Every message type, in the order of the catalogue module."""
    return [
        value
        for name, value in vars(messages).items()
        if inspect.isclass(value) and issubclass(value, msgspec.Struct) and not name.startswith("_")
        if value.__module__ == messages.__name__
    ]


def tag(kind: type) -> str:
    value = getattr(getattr(kind, "__struct_config__", None), "tag", None)
    return str(value) if value else ""


def describe(kind: type[msgspec.Struct]) -> list[str]:
    """One message: its docstring and its fields."""
    title = f"### {kind.__name__}"
    name = tag(kind)
    field = kind.__struct_config__.tag_field
    lines = [title, "", *([f"`{field}`: `{name}`", ""] if name else []), inspect.getdoc(kind) or "", ""]
    notes = _field_notes(kind)
    hints = typing.get_type_hints(kind)
    fields = msgspec.structs.fields(kind)
    if fields:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
    for f in fields:
        default = "" if f.required else f"`{_default(f)}`"
        lines.append(f"| `{f.name}` | {_type(hints[f.name])} | {default} | {notes.get(f.name, '')} |")
    return [*lines, ""]


def _field_notes(kind: type) -> dict[str, str]:
    """The docstrings that stand under fields."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            notes[field.target.id] = " ".join(str(after.value.value).split())
    return notes


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
    if callable(value):
        value = value()
    if isinstance(value, msgspec.Struct):
        return "{}"
    return {None: "null", True: "true", False: "false"}.get(value, repr(value)) if _plain(value) else repr(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _type(hint: Any) -> str:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(f"`{a!r}`".replace("'", '"') for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    if inspect.isclass(hint) and issubclass(hint, msgspec.Struct):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "bytes": "bytes"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


if __name__ == "__main__":
    print(document(), end="")
