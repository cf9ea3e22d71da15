"""Imports a sentence-embedding model of the BERT family (MiniLM) to ONNX, without torch.

Graph: `input_ids`, `attention_mask` int64 [batch, seq] to `embedding` float32 [batch, hidden]: mean pooling over
the attended positions and scaling to unit length are inside.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from shared.errors import UnsupportedModel
from shared.models import safetensors
from shared.models.files import sha256_of, weights_file
from shared.models.gguf_import import describe_variant
from shared.models.manifest import Architecture, Manifest, TokenizerInfo
from shared.models.static_embedder import write_table

_MS = "com.microsoft"


def import_embedder(
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
    """Convert the folder at `path` (config.json, model.safetensors, tokenizer.json) into `folder`; the manifest also
    lists `existing`'s variants.

    Raises:
        UnsupportedModel: a file is missing, or the architecture, pooling or variant is not a known one.
    """
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (path / file).is_file():
            raise UnsupportedModel(f"{path} holds no {file}.", "Give the folder of a sentence-transformers model.")
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise UnsupportedModel(
            f"{path} is a {config.get('model_type')!r} model with {config.get('hidden_act')!r} activation.",
            "Sentence embedders of the BERT family with gelu are read.",
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedModel(f"{path} has {config['position_embedding_type']} positions.", "Absolute ones are read.")
    pooling = path / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens"):
        raise UnsupportedModel(f"{path} does not pool by the mean.", "Use a sentence embedder with mean pooling.")
    weights = {k.removeprefix("bert."): v for k, v in safetensors.read(path / "model.safetensors").items()}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path / "tokenizer.json", folder / "tokenizer.json")
    made = list(existing.variants) if existing else []
    for variant in variants:
        if any(v.name == variant for v in made):
            continue
        if variant not in ("fp32", "int8", "static"):
            raise UnsupportedModel(f"There is no variant {variant!r} of an embedder.", "Use fp32, int8 or static.")
        on_variant(variant)
        target = folder / variant
        target.mkdir(parents=True, exist_ok=True)
        full = target / ("model.onnx" if variant == "fp32" else "full.onnx")
        onnx.save(_Builder(config, weights).model(), str(full))
        if variant == "static":
            _distil(full, folder / "tokenizer.json", target)
            full.unlink()
        elif variant == "int8":
            _quantize(full, target / "model.onnx")
            full.unlink()
        made.append(describe_variant(variant, target, "static" if variant == "static" else "encoder"))
    return Manifest(
        name=name,
        kind="embedder",
        source=source,
        source_sha256=sha256_of(weights_file(path)),
        licence=licence,
        created_at=time.time(),
        architecture=Architecture(
            family="bert",
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_attention_heads"],
            head_size=config["hidden_size"] // config["num_attention_heads"],
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            parameters=int(sum(v.size for v in weights.values())),
        ),
        tokenizer=TokenizerInfo(sha256=sha256_of(folder / "tokenizer.json")),
        variants=made,
    )


def _distil(full: Path, tokenizer: Path, target: Path) -> None:
    """The table of `shared.models.static_embedder`, by running the full model over its vocabulary."""
    import onnxruntime as ort  # noqa: PLC0415 heavy

    session = ort.InferenceSession(str(full), providers=["CPUExecutionProvider"])

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {"input_ids": ids, "attention_mask": mask})[0], np.float32)

    write_table(forward, Tokenizer.from_file(str(tokenizer)), target)


def _quantize(source: Path, target: Path) -> None:
    """Dynamic int8 of weights and activations: half the time of fp32, in a quarter of its bytes, at a cosine of
    .982 to .995 (mean .992; measured).

    One scale for each output channel matters: with one a matrix, the cosine was .81 to .88.
    """
    import logging  # noqa: PLC0415

    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 heavy

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on pre-processing through the root logger
    try:
        quantize_dynamic(
            str(source),
            str(target),
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,  # 7-bit weights: without VNNI, AVX2 can saturate on 8
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(level)


class _Builder:
    def __init__(self, config: dict[str, Any], weights: dict[str, NDArray[np.float32]]) -> None:
        self._c = config
        self._w = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inits: list[onnx.TensorProto] = []

    def _init(self, name: str, value: NDArray[Any]) -> str:
        self._inits.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name=f"{output}.node", domain=domain, **attributes))
        return output

    def _linear(self, x: str, name: str) -> str:
        weight = self._init(f"{name}.w", self._w[f"{name}.weight"].T)
        product = self._node("MatMul", [x, weight], f"{name}.product")
        return self._node("Add", [product, self._init(f"{name}.b", self._w[f"{name}.bias"])], f"{name}.out")

    def _norm(self, x: str, residual: str, name: str) -> str:
        gain = self._init(f"{name}.gain", self._w[f"{name}.weight"])
        bias = self._init(f"{name}.bias", self._w[f"{name}.bias"])
        return self._node(
            "SkipLayerNormalization", [x, residual, gain, bias], f"{name}.out", _MS,
            epsilon=float(self._c["layer_norm_eps"]),
        )  # fmt: skip

    def _layer(self, index: int, x: str) -> str:
        p = f"encoder.layer.{index}"
        q, k, v = (self._linear(x, f"{p}.attention.self.{side}") for side in ("query", "key", "value"))
        attended = self._node(
            "MultiHeadAttention", [q, k, v, "", "mask32"], f"{p}.attended", _MS,
            num_heads=int(self._c["num_attention_heads"]),
        )  # fmt: skip
        x = self._norm(self._linear(attended, f"{p}.attention.output.dense"), x, f"{p}.attention.output.LayerNorm")
        inner = self._node("Gelu", [self._linear(x, f"{p}.intermediate.dense")], f"{p}.gelu", _MS)
        return self._norm(self._linear(inner, f"{p}.output.dense"), x, f"{p}.output.LayerNorm")

    def model(self) -> onnx.ModelProto:
        e = "embeddings"
        words = self._node(
            "Gather", [self._init("words", self._w[f"{e}.word_embeddings.weight"]), "input_ids"], "word_vectors"
        )
        # Every text is of type 0: that row is added to the positions once and for all.
        places = self._w[f"{e}.position_embeddings.weight"] + self._w[f"{e}.token_type_embeddings.weight"][0]
        self._init("places", places)
        zero, one = self._init("zero", np.array([0], np.int64)), self._init("one", np.array([1], np.int64))
        length = self._node("Shape", ["input_ids"], "length", start=1, end=2)
        here = self._node("Slice", ["places", zero, length, zero], "places_here")
        positions = self._node("Unsqueeze", [here, zero], "positions")
        x = self._norm(words, positions, f"{e}.LayerNorm")
        self._node("Cast", ["attention_mask"], "mask32", to=TensorProto.INT32)
        for index in range(int(self._c["num_hidden_layers"])):
            x = self._layer(index, x)
        mask = self._node("Cast", ["attention_mask"], "mask_float", to=TensorProto.FLOAT)
        weights = self._node("Unsqueeze", [mask, self._init("last", np.array([-1], np.int64))], "mask_column")
        summed = self._node("ReduceSum", [self._node("Mul", [x, weights], "attended_only"), one], "summed", keepdims=0)
        count = self._node("ReduceSum", [mask, one], "count", keepdims=1)
        mean = self._node("Div", [summed, count], "mean")
        self._node("LpNormalization", [mean], "embedding", axis=-1, p=2)
        ids = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
            for name in ("input_ids", "attention_mask")
        ]
        out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", int(self._c["hidden_size"])])
        graph = helper.make_graph(self._nodes, "embedder", ids, [out], self._inits)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 9
        return model
