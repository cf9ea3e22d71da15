"""LoRA adapters: a row with an adapter computes what the merged model would, beside rows with others or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from services.workers.engine.batcher import Batcher, Finished, Request
from services.workers.engine.lora import AdaptedRunner, Stack, adapted
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import Device, Sampling
from shared.models import lora
from shared.models.checkpoint_import import import_checkpoint
from shared.models.manifest import Manifest
from tests import tiny_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = Device(kind="cpu", name="cpu", threads=1)
SLOTS, CONTEXT = 4, 64
PROMPTS = ([5, 40, 7, 99, 13], [60, 61, 62], [5, 40, 7, 99, 13, 200])


class NoMeter:
    source = "model"

    def read_j(self) -> float:
        return 0.0


@dataclass
class Models:
    """A base model, two adapters of different ranks and places, and the models that result from merging each."""

    root: Path
    base: Manifest
    adapters: dict[str, lora.Adapter]
    merged: dict[str, Manifest]

    def runner(self, name: str, rows: int = SLOTS) -> SharedKvRunner:
        file = self.root / name / "fp32" / "model.onnx"
        return SharedKvRunner(open_session(file, CPU, 1), rows, CONTEXT, CPU)

    def adapted_runner(self, stack: Stack, variant: str = "fp32") -> AdaptedRunner:
        file = self.root / "base" / variant / "model.onnx"
        return AdaptedRunner(open_session(file, CPU, 1, graph=adapted(file, stack)), SLOTS, CONTEXT, CPU, stack)


def take_in(source: Path, folder: Path, *variants: str) -> Manifest:
    return import_checkpoint(source, folder, name="t", licence="", source="", variants=variants)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("lora")
    checkpoint = write_tiny_checkpoint(root / "checkpoint", family="llama")
    base = take_in(checkpoint, root / "base", "fp32", "int8", "int4", "fp16", "int8-fp16")
    one = tiny_adapter.factors(checkpoint, rank=4, seed=1)
    two = tiny_adapter.factors(checkpoint, rank=2, modules=("q_proj", "v_proj", "down_proj"), seed=2)
    read = {
        "one": lora.read_adapter(tiny_adapter.write_peft(root / "one", one, alpha=4.0), base.architecture),
        "two": lora.read_adapter(tiny_adapter.write_peft(root / "two", two, alpha=3.0), base.architecture),
    }
    merged = {
        name: take_in(tiny_adapter.merge(checkpoint, made, root / f"{name}-whole", scale=s), root / f"{name}-m", "fp32")
        for name, made, s in (("one", one, 1.0), ("two", two, 1.5))
    }
    return Models(root, base, read, merged)


def test_rows_of_one_batch_use_adapters_of_their_own(models: Models) -> None:
    """Prefill and decode with no, the first and the second adapter side by side, in fp32 as the merged models do."""
    stack = Stack(models.adapters)
    runner = models.adapted_runner(stack)
    alone = [models.runner("base", 1), models.runner("one-m", 1), models.runner("two-m", 1)]
    for row, prompt in enumerate(PROMPTS):
        stack.select([row])
        expected = alone[row].prefill(0, prompt, 0)
        np.testing.assert_allclose(runner.prefill(row, prompt, 0), expected, rtol=0, atol=1e-4)
    lengths = [len(p) for p in PROMPTS]
    differ = 0.0
    for step in range(4):
        tokens = [10 + step, 20 + step, 30 + step]
        stack.select([0, 1, 2])
        found = runner.decode(tokens, lengths).copy()
        for row in range(3):
            expected = alone[row].decode([tokens[row]], [lengths[row]])[0]
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-4)
        stack.select([0, 0, 0])
        differ = max(differ, float(np.abs(runner.decode(tokens, lengths)[1:] - found[1:]).max()))
        stack.select([0, 1, 2])
        runner.decode(tokens, lengths)  # what the call without adapters wrote into the cache is written again
        lengths = [n + 1 for n in lengths]
    assert differ > 0.1  # so that the comparison above means something


def test_a_gguf_adapter_is_the_same_adapter(models: Models, tmp_path: Path) -> None:
    """With q and k in the other order of rows, and its alpha, it comes to the same tensors."""
    made = tiny_adapter.factors(models.root / "checkpoint", rank=4, seed=1)
    read = lora.read_adapter(tiny_adapter.write_gguf(tmp_path / "a.gguf", made), models.base.architecture)
    assert read.keys() == models.adapters["one"].keys()
    for site, pair in read.items():
        np.testing.assert_allclose(pair.a, models.adapters["one"][site].a, atol=1e-7)
        np.testing.assert_allclose(pair.b, models.adapters["one"][site].b, atol=1e-7)


def test_an_adapter_is_kept_as_it_was_read(models: Models, tmp_path: Path) -> None:
    """What the store holds is what was read."""
    lora.write(models.adapters["two"], tmp_path / lora.FILE)
    again = lora.load(tmp_path / lora.FILE)
    assert again.keys() == models.adapters["two"].keys()
    assert all(np.array_equal(again[s].b, p.b) for s, p in models.adapters["two"].items())


@pytest.mark.parametrize(("variant", "least"), [("int8", 0.99), ("int4", 0.9), ("fp16", 0.999), ("int8-fp16", 0.99)])
def test_quantised_and_half_precision_bases_take_adapters_too(models: Models, variant: str, least: float) -> None:
    """The adapter moves such a base's logits as it moves the fp32 base's, as nearly as the base allows."""
    moved = {}
    for kind in ("fp32", variant):
        stack = Stack(models.adapters)
        runner, found = models.adapted_runner(stack, kind), []
        for number in (0, 1):
            stack.select([number])
            found.append(runner.prefill(0, PROMPTS[0], 0))
        moved[kind] = found[1] - found[0]
    assert np.corrcoef(moved["fp32"], moved[variant])[0, 1] > least


def _generate(batcher: Batcher, wanted: dict[str, str]) -> dict[str, tuple[int, ...]]:
    for name, adapter in wanted.items():
        prompt = [5, 40, 7, 99, 13, 200, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53]
        batcher.add(Request(name, [], Sampling(max_tokens=12), prompt=prompt, adapter=adapter))
    ended: dict[str, tuple[int, ...]] = {}
    while batcher.active:
        ended |= {e.id: e.tokens for e in batcher.step() if isinstance(e, Finished)}
    return ended


def test_a_batch_mixes_adapters_and_shares_no_prefix_between_them(models: Models) -> None:
    """One prompt under three adapters at once, and again over a warm cache: each as its merged model answers."""
    text = Text(models.root / "base", models.base.tokenizer)
    stack = Stack(models.adapters)
    common = {"slots": SLOTS, "context": CONTEXT, "meter": NoMeter()}
    mixed = Batcher(models.adapted_runner(stack), text, adapters=stack, **common)  # type: ignore[arg-type]
    expected = {}
    for folder, name in (("base", ""), ("one-m", "one"), ("two-m", "two")):
        alone = Batcher(models.runner(folder), text, **common)  # type: ignore[arg-type]
        expected[name] = _generate(alone, {"x": ""})["x"]
    assert len(set(expected.values())) == 3
    for _ in range(2):
        found = _generate(mixed, {"a": "one", "b": "", "c": "two", "d": "one"})
        assert found == {"a": expected["one"], "b": expected[""], "c": expected["two"], "d": expected["one"]}
    with pytest.raises(ModelMissing, match="three"):
        mixed.add(Request("z", [], Sampling(), prompt=[5], adapter="three"))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_adapters_that_would_be_applied_in_part_are_refused(
    models: Models, tmp_path: Path, config: dict[str, object], what: str
) -> None:
    """What an adapter has besides A and B is named."""
    made = tiny_adapter.factors(models.root / "checkpoint", rank=2)
    with pytest.raises(UnsupportedModel, match=what):
        lora.read_adapter(tiny_adapter.write_peft(tmp_path / "a", made, **config), models.base.architecture)


def test_an_adapter_of_another_model_is_refused(models: Models, tmp_path: Path) -> None:
    """Sizes that do not fit are named with the layer."""
    other = write_tiny_checkpoint(tmp_path / "other", hidden=96)
    made = tiny_adapter.factors(other, rank=2)
    with pytest.raises(UnsupportedModel, match=r"layer 0, .*not this model's"):
        lora.read_adapter(tiny_adapter.write_peft(tmp_path / "a", made), models.base.architecture)
