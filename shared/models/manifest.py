"""The manifest of a stored model: what it is, where it came from, its variants and what each needs."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from shared.messages import ArtifactSpec

MANIFEST_FILE = "manifest.json"


class Architecture(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Numbers that memory and cost follow from."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    """Longest context the model was made for, in tokens."""
    parameters: int = 0
    kv_dtype: Literal["float32", "float16"] = "float32"

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value bytes of one token over all layers."""
        size = 4 if self.kv_dtype == "float32" else 2
        return 2 * self.layers * self.kv_heads * self.head_size * size


class TokenizerInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    file: str = "tokenizer.json"
    sha256: str = ""
    bos_token: str = ""
    eos_token: str = ""
    stop_token_ids: list[int] = []
    """Generation ends at any of these (end of text, end of turn)."""
    add_bos: bool = False
    chat_template: str = ""
    """File name of the Jinja chat template; empty when the model has none."""


class Variant(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    """`fp32`, `fp16`, `int8`, `int4`, `int8-fp16`, `int4-fp16`, or a name of its own for ready ONNX directories."""
    path: str
    """Folder inside the model's folder; holds `model.onnx` and what it refers to."""
    layout: Literal["calm", "gqa", "concat", "encoder", "static", "lora"]
    """`calm`: our importer's graph (inputs input_ids, seqlens_k, total_sequence_length, shared KV buffers).
    `gqa`: GroupQueryAttention graph driven by attention_mask, shared KV buffers (onnxruntime-genai style).
    `concat`: present = past + new (plain Optimum export). `encoder`: an embedding model;
    `static`: embeddings looked up in a table; `lora`: an adapter, `adapter.safetensors`."""
    weights_bytes: int
    """Bytes of weights in memory once loaded."""
    files: dict[str, str] = {}
    """sha256 by file name, inside `path`."""
    kv_dtype: Literal["float32", "float16"] | None = None
    """Of its KV cache, when that is not what the architecture says."""
    converter: int = 0
    """Of layout `calm`, the `CONVERTER` that made it: a variant of another one is made anew by the next pull."""


class Manifest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    kind: Literal["generator", "embedder", "adapter"] = "generator"
    base: str = ""
    """Of an adapter, the model that it was made for; `architecture` is that model's."""
    source: str = ""
    source_sha256: str = ""
    licence: str = ""
    created_at: float = 0.0
    architecture: Architecture
    tokenizer: TokenizerInfo = TokenizerInfo()
    variants: list[Variant] = []

    def variant(self, name: str) -> Variant | None:
        return next((v for v in self.variants if v.name == name), None)

    def artifact(
        self, variant: Variant, *, slots: int, context: int, overhead_bytes: int, sequences: int = 0
    ) -> ArtifactSpec:
        """The variant as something a worker can hold: memory for `slots` sequences of `context` tokens, shared by up
        to `sequences` where they are shorter."""
        architecture = replace(self.architecture, kv_dtype=variant.kv_dtype or self.architecture.kv_dtype)
        return ArtifactSpec(
            name=artifact_name(self.name, variant.name),
            model=self.name,
            variant=variant.name,
            weights_bytes=variant.weights_bytes,
            kv_bytes_per_token=architecture.kv_bytes_per_token,
            slots=slots,
            context=min(context, self.architecture.context),
            sequences=sequences,
            overhead_bytes=overhead_bytes,
            tokenizer=self.tokenizer.sha256,
        )


def artifact_name(model: str, variant: str) -> str:
    return f"{model}-{variant}"
