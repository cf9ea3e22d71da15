"""Imports a llama-family GGUF file: architecture, tokenizer, chat template, and graphs in several precisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel
from shared.models import gguf_tokenizer
from shared.models.files import sha256_of
from shared.models.manifest import Architecture, Manifest, TokenizerInfo, Variant
from shared.models.onnx_graph import DecoderBuilder

Floats = NDArray[np.float32]

PRECISIONS = ("fp32", "int8", "int4")

_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_REFUSED_FIELDS = (
    "llama.rope.scale_linear", "llama.attention.scale", "llama.logit_scale", "llama.embedding_scale",
    "llama.residual_scale", "llama.attention.clamp_kqv", "llama.use_parallel_residual",
)  # fmt: skip
"""Each changes what the graph would compute."""


class GgufModel:
    """A GGUF file opened for import.

    Raises:
        UnsupportedModel: not a GGUF file, not of the llama family, or with something this importer lacks.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # noqa: PLC0415 heavy, and only importing needs it

        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, OverflowError, OSError) as error:
            raise UnsupportedModel(f"{path} cannot be read as GGUF ({error}).", "Is the download complete?") from None
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        family = self.fields.get("general.architecture")
        if family != "llama":
            raise UnsupportedModel(
                f"{path.name} is of the {family!r} architecture; this importer reads `llama`.",
                "Use a model of the llama family, or a ready ONNX folder.",
            )
        self._refuse_unknown()
        self.architecture = self._architecture()

    def _value(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(f"llama.{key}", default)
        if value is None:
            raise UnsupportedModel(f"{self.path.name} lacks `llama.{key}`.", "Re-convert it with a newer converter.")
        return value

    def _refuse_unknown(self) -> None:
        scaling = self.fields.get("llama.rope.scaling.type")
        if scaling not in (None, "none", "linear"):
            raise UnsupportedModel(
                f"Rope scaling {scaling!r} is not supported.", "Use another conversion of the model."
            )
        changed = [name for name in _REFUSED_FIELDS if self.fields.get(name)]
        if changed:
            raise UnsupportedModel(f"`{changed[0]}` is not supported.", "Use another conversion of the model.")
        if int(self.fields.get("split.count", 0)) > 1:
            raise UnsupportedModel(f"{self.path.name} is one part of several.", "Merge them with `gguf-split --merge`.")
        if self.fields.get("llama.expert_count"):
            raise UnsupportedModel("Mixture-of-experts models are not supported.", "Use a dense model.")
        if self.fields.get("llama.attention.sliding_window"):
            raise UnsupportedModel("Sliding-window attention is not supported.", "Use a model without it.")
        blocks = range(int(self._value("block_count")))
        needed = {"token_embd.weight", "output_norm.weight"}
        needed |= {f"blk.{index}.{part}.weight" for index in blocks for part in _BLOCK}
        lacking = sorted(needed - self._tensors.keys())
        if lacking:
            raise UnsupportedModel(f"{self.path.name} lacks the tensor {lacking[0]}.", "Is the download complete?")
        # A tensor that the graph would leave out (a bias, a norm of q and k) makes another model: refused by name.
        unknown = sorted(self._tensors.keys() - needed - {"output.weight", "rope_freqs.weight"})
        if unknown:
            raise UnsupportedModel(
                f"The tensor {unknown[0]} is not supported ({len(unknown)} such).", "Use a plain llama model."
            )

    def _architecture(self) -> Architecture:
        if isinstance(self._value("attention.head_count_kv", 1), list):
            raise UnsupportedModel("KV heads that differ by layer are not supported.", "Use a plain llama model.")
        hidden, heads = int(self._value("embedding_length")), int(self._value("attention.head_count"))
        head_size = int(self._value("attention.key_length", hidden // heads))
        rotated = int(self._value("rope.dimension_count", head_size))
        if rotated != head_size:
            raise UnsupportedModel(
                f"Partial rotation ({rotated} of {head_size}) is not supported.", "Use another model."
            )
        if int(self._value("attention.value_length", head_size)) != head_size:
            raise UnsupportedModel("Keys and values of different sizes are not supported.", "Use a plain llama model.")
        inner = int(self._tensors["blk.0.ffn_gate.weight"].shape[1])
        for size in (hidden, heads * head_size, inner):
            if size % 32:
                raise UnsupportedModel(f"Layer size {size} is not a multiple of 32.", "Use another model.")
        tokens = self.fields.get("tokenizer.ggml.tokens")
        if not tokens:
            raise UnsupportedModel("The file has no tokenizer.", "Use a GGUF with its vocabulary included.")
        table = self._tensors["token_embd.weight"]
        return Architecture(
            family="llama",
            layers=int(self._value("block_count")),
            hidden=hidden,
            heads=heads,
            kv_heads=int(self._value("attention.head_count_kv", heads)),
            head_size=head_size,
            vocab=int(table.shape[1]),
            context=int(self._value("context_length")),
            parameters=int(sum(int(np.prod(tensor.shape)) for tensor in self._tensors.values())),
        )

    def weight(self, name: str) -> Floats | None:
        """A tensor as float32, or None when the file has none of that name.

        Raises:
            UnsupportedModel: stored in a format that cannot be read.
        """
        from gguf.quants import dequantize  # noqa: PLC0415

        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModel(
                f"Tensor {name} is stored as {tensor.tensor_type.name}, which cannot be read.",
                "Use a GGUF in F16, Q8_0, Q4_0, Q4_1 or a K-quant.",
            ) from None
        return np.asarray(values, dtype=np.float32)

    def rope_angles(self) -> Floats:
        """Rotation angles [context, head_size / 2], with linear scaling or Llama 3's frequency factors."""
        a = self.architecture
        base = float(self.fields.get("llama.rope.freq_base", 10000.0))
        inverse = 1.0 / (base ** (np.arange(0, a.head_size, 2) / a.head_size))
        factors = self.weight("rope_freqs.weight")
        if factors is not None:
            inverse = inverse / factors.ravel()
        scale = 1.0
        if self.fields.get("llama.rope.scaling.type") == "linear":
            scale = float(self.fields.get("llama.rope.scaling.factor", 1.0))
        return np.outer(np.arange(a.context) / scale, inverse).astype(np.float32)

    def write_variant(self, precision: str, folder: Path) -> None:
        """Write `model.onnx` in `precision` into `folder`."""
        if precision not in PRECISIONS:
            raise UnsupportedModel(
                f"There is no variant {precision!r}.", f"Variants of a GGUF are {', '.join(PRECISIONS)}."
            )
        builder = DecoderBuilder(
            self.architecture,
            self.weight,
            precision,  # type: ignore[arg-type]
            rms_epsilon=float(self._value("attention.layer_norm_rms_epsilon")),
            rope_angles=self.rope_angles(),
        )
        builder.save(folder)

    def write_tokenizer(self, folder: Path) -> TokenizerInfo:
        """Write `tokenizer.json` and the chat template; returns what the manifest says of them."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tokenizer.json"
        gguf_tokenizer.build(self.fields).save(str(file))
        template = self.fields.get("tokenizer.chat_template", "")
        if template:
            (folder / "chat_template.jinja").write_text(template)
        tokens = self.fields["tokenizer.ggml.tokens"]
        sentencepiece = self.fields.get("tokenizer.ggml.model") == "llama"
        bos = self.fields.get("tokenizer.ggml.bos_token_id")
        eos = self.fields.get("tokenizer.ggml.eos_token_id")
        return TokenizerInfo(
            sha256=sha256_of(file),
            bos_token=tokens[bos] if bos is not None else "",
            eos_token=tokens[eos] if eos is not None else "",
            stop_token_ids=gguf_tokenizer.stop_token_ids(self.fields),
            add_bos=bool(self.fields.get("tokenizer.ggml.add_bos_token", sentencepiece)),
            chat_template="chat_template.jinja" if template else "",
        )


def import_gguf(
    path: Path,
    folder: Path,
    *,
    name: str,
    licence: str,
    source: str,
    variants: Sequence[str],
    existing: Manifest | None = None,
    on_variant: Callable[[str], None] = lambda _name: None,
) -> Manifest:
    """Write the variants of a GGUF into `folder` and return the manifest, which also lists `existing`'s."""
    model = GgufModel(path)
    tokenizer = model.write_tokenizer(folder)
    made: list[Variant] = list(existing.variants) if existing else []
    for precision in variants:
        if any(v.name == precision for v in made):
            continue
        on_variant(precision)
        target = folder / precision
        model.write_variant(precision, target)
        made.append(describe_variant(precision, target, "calm"))
    licence = licence or str(model.fields.get("general.license", ""))
    return Manifest(
        name=name,
        source=source,
        source_sha256=existing.source_sha256 if existing else sha256_of(path),
        licence=licence,
        created_at=time.time(),
        architecture=model.architecture,
        tokenizer=tokenizer,
        variants=made,
    )


def describe_variant(name: str, folder: Path, layout: Any, path: str = "") -> Variant:
    """A variant's entry in the manifest, from the files in its folder."""
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Variant(name=name, path=path or name, layout=layout, weights_bytes=size, files=files)
