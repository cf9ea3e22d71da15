"""The model families that GGUF files can be imported from: one module of traits each."""

from __future__ import annotations

from shared.errors import UnsupportedModel
from shared.models.families import gemma, gemma2, gemma3, llama, phi3, qwen2, qwen3
from shared.models.families.spec import Family
from shared.models.gguf_file import GgufFile

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, qwen2, qwen3, phi3, gemma, gemma2, gemma3)
}

_VISION = ("clip", "mllama", "llava")


def family_of(file: GgufFile) -> Family:
    """The family of a file.

    Raises:
        UnsupportedModel: none of those there are; the message names the architecture.
    """
    name = file.architecture
    family = FAMILIES.get(name)
    if family is not None:
        return family
    known = ", ".join(FAMILIES)
    if name in _VISION or "vl" in name:
        raise UnsupportedModel(
            f"{file.path.name} is of the {name!r} architecture: image input is not supported.",
            f"Use a text model of one of the families {known}.",
        )
    if "moe" in name:
        raise UnsupportedModel(
            f"{file.path.name} is of the {name!r} architecture: mixture-of-experts models are not supported.",
            f"Use a dense model of one of the families {known}.",
        )
    raise UnsupportedModel(
        f"{file.path.name} is of the {name!r} architecture; this importer reads {known}.",
        "Use a model of one of these families, or a ready ONNX folder (`calm models export`).",
    )
