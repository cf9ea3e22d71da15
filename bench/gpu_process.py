"""The process that `bench.gpu` measures in: it opens models as engines do and drives them, told so over a pipe.

The parent does nothing on the device, so that what the device holds is what these processes hold.
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from services.workers.engine.batcher import Batcher, Delta, Finished, Request
from services.workers.engine.cache import DeviceCache
from services.workers.engine.captured import CapturedRunner
from services.workers.engine.energy import AttributedMeter, Meter, choose_meter
from services.workers.engine.loader import Opened, give_back, open_model, start
from shared import codec
from shared.errors import CalmError, EngineFailed, EngineLost, OperationTimeout
from shared.messages import Device, Sampling
from shared.models.store import ModelStore
from shared.settings import Settings

START_S = 120.0
"""Most that a process may take to start, and to import everything."""
ANSWER_S = 3600.0
WARM = 3
"""Steps that are not counted: ONNX Runtime captures with the third run of as many rows."""


@dataclass
class _Counted:
    """What went by while something was measured."""

    seconds: float = 0.0
    joules: float = 0.0
    tokens: int = 0
    steps: int = 0


class Driver:
    """Runs in the process: models by name, and what is measured of them. Each method answers one message."""

    def __init__(self, device: Device, settings: Settings) -> None:
        self._device = device
        self._meter: Meter = choose_meter(
            device, settings.power_idle_w, settings.power_core_w, visible=settings.cuda_visible_devices
        )
        self._opened: dict[str, Opened] = {}
        self._held: Any = None
        self._random = np.random.default_rng(0)

    def hello(self) -> dict[str, Any]:
        return {"energy": self._meter.source}

    def context(self) -> dict[str, Any]:
        """Touch the device, with as little as can be: what remains is what each process costs."""
        with contextlib.suppress(AttributeError):  # as `open_session` does
            ort.preload_dlls()
        self._held = DeviceCache(["x"], 1, [(1, 16, 16)], np.float16, self._device)
        self._held._copy("x", self._held.pointer("x", 0), self._held.pointer("x", 0))
        return {}

    def open(self, key: str, store: str, model: str, variant: str, context: int, graphs: bool) -> dict[str, Any]:
        """Open a variant, and answer one short prompt with it."""
        models = ModelStore(Path(store))
        manifest = models.get(model)
        found = models.variant(model, variant)
        spec = manifest.artifact(found, slots=1, context=context, overhead_bytes=0)
        counted = _Counted()
        with self._counting(counted):
            opened = open_model(models.path(model), manifest, spec, self._device, cuda_graphs=graphs)
            if graphs and self._device.kind == "cpu":  # everything but the capturing can be tried there
                opened = replace(opened, captures=True)
            opened.text.stop_ids = frozenset()
            self._opened[key] = opened
            open_s = opened.load_s
            self._first(opened)
        return {
            "open_s": open_s, "ready_s": counted.seconds, "joules": counted.joules, "captures": opened.captures,
            "weights_bytes": spec.weights_bytes, "kv_bytes_per_token": spec.kv_bytes_per_token,
        }  # fmt: skip

    def close(self, key: str) -> dict[str, Any]:
        """Give a model up and stay: what an evict would be if processes held several."""
        began = time.perf_counter()
        del self._opened[key]
        give_back()
        return {"seconds": time.perf_counter() - began}

    def prefill(self, key: str, tokens: int, seconds: float) -> dict[str, Any]:
        """Prompts of so many tokens, one at a time, each other than those before."""
        opened = self._opened[key]
        batcher = self._batcher(opened, 1, tokens + 8)
        self._read(batcher, tokens)
        counted = _Counted()
        with self._counting(counted):
            while counted.tokens == 0 or counted.seconds < seconds:
                self._read(batcher, tokens)
                counted.tokens += tokens
                counted.seconds = self._elapsed()
        return {"tokens": tokens, **_rates(counted)}

    def decode(self, key: str, batch: int, prompt_tokens: int, context: int, seconds: float) -> dict[str, Any]:
        """So many sequences at once, each in a row of its own, after short prompts. Whole steps, as clients see them,
        and how much of each is the runner's: the device, and copies to and from it."""
        opened = self._opened[key]
        batcher = self._batcher(opened, batch, context)
        runner, inside = batcher._runner, _Counted()
        began = [_now()]
        decode = runner.decode

        def timed(*arguments: Any) -> Any:
            began[0] = _now()
            logits = decode(*arguments)
            inside.seconds += _now() - began[0]
            inside.steps += 1
            return logits

        total, gaps = _Counted(), []
        while not total.steps or total.seconds < seconds:
            self._fill(batcher, batch, prompt_tokens, context)
            for _ in range(WARM):
                batcher.step()
            runner.decode = timed  # type: ignore[assignment, method-assign]
            counted = _Counted()
            with self._counting(counted):
                left = context - prompt_tokens - 2 * batch - WARM - 2
                while left > 0 and (not counted.steps or total.seconds + counted.seconds < seconds):
                    before = _now()
                    batcher.step()
                    gaps.append(_now() - before)
                    counted.steps += 1
                    counted.tokens += batch
                    counted.seconds = self._elapsed()
                    left -= 1
            runner.decode = decode  # type: ignore[method-assign]
            batcher.clear()
            for name in ("seconds", "joules", "tokens", "steps"):
                setattr(total, name, getattr(total, name) + getattr(counted, name))
        return {
            "batch": batch, "captured": isinstance(runner, CapturedRunner) and runner.capturing,
            "step_s": total.seconds / total.steps, "median_step_s": statistics.median(gaps),
            "runner_s": inside.seconds / inside.steps, **_rates(total),
        }  # fmt: skip

    # --- inside ---

    @contextlib.contextmanager
    def _counting(self, counted: _Counted) -> Iterator[None]:
        self._since, before = _now(), self._meter.read_j()
        yield
        counted.seconds, counted.joules = self._elapsed(), self._meter.read_j() - before

    def _elapsed(self) -> float:
        return _now() - self._since

    def _batcher(self, opened: Opened, slots: int, context: int) -> Batcher:
        give_back()
        spec = msgspec.structs.replace(opened.spec, slots=slots, context=context)
        return start(replace(opened, spec=spec), AttributedMeter("model", 1.0), clock=time.perf_counter)

    def _prompt(self, tokens: int, vocab: int) -> list[int]:
        return [int(t) for t in self._random.integers(0, vocab, tokens)]

    def _first(self, opened: Opened) -> None:
        self._read(self._batcher(opened, 1, 32), 8)

    def _read(self, batcher: Batcher, tokens: int) -> None:
        prompt = self._prompt(tokens, batcher._runner.vocab)
        batcher.add(Request("x", [], Sampling(max_tokens=1), prompt=prompt))
        while not any(isinstance(event, Finished) for event in batcher.step()):
            pass

    def _fill(self, batcher: Batcher, batch: int, prompt_tokens: int, context: int) -> None:
        """Until every sequence decodes."""
        for row in range(batch):
            prompt = self._prompt(prompt_tokens, batcher._runner.vocab)
            sampling = Sampling(max_tokens=context - prompt_tokens)
            batcher.add(Request(str(row), [], sampling, prompt=prompt, streamed=False))
        started: set[str] = set()
        while len(started) < batch:
            started |= {event.id for event in batcher.step() if isinstance(event, Delta)}


def _now() -> float:
    return time.perf_counter()


def _rates(counted: _Counted) -> dict[str, float]:
    return {
        "tokens_per_s": counted.tokens / counted.seconds, "token_j": counted.joules / counted.tokens,
        "seconds": counted.seconds,
    }  # fmt: skip


def serve(pipe: Connection, device: Device) -> None:
    """Answer messages until told `end`, or until the parent is gone."""
    driver = Driver(device, Settings.from_env())
    pipe.send(("ok", driver.hello()))
    while True:
        try:
            name, more = pipe.recv()
        except EOFError:
            return
        if name == "end":
            return
        try:
            call: Callable[..., dict[str, Any]] = getattr(driver, name)
            pipe.send(("ok", call(**more)))
        except CalmError as error:
            pipe.send(("failed", codec.failure_of(error)))
        except Exception as error:  # noqa: BLE001 of ONNX Runtime, for instance that memory is short
            pipe.send(("failed", codec.failure_of(EngineFailed(f"{error}", ""))))


class Process:
    """Such a process, as the parent has it. Errors of the process are raised here."""

    def __init__(self, device: Device) -> None:
        spawning = multiprocessing.get_context("spawn")
        began = time.perf_counter()
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=serve, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()
        self.energy: str = self._answer(START_S)["energy"]
        self.start_s = time.perf_counter() - began
        """Until it has imported everything."""

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def ask(self, name: str, **more: Any) -> dict[str, Any]:
        """Raises what the process raised, OperationTimeout, or EngineLost when it has ended."""
        try:
            self._pipe.send((name, more))
        except OSError:
            raise self._lost() from None
        return self._answer(ANSWER_S)

    def end(self) -> float:
        """Seconds until the process has ended."""
        began = time.perf_counter()
        with contextlib.suppress(OSError):
            self._pipe.send(("end", {}))
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()
        return time.perf_counter() - began

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        if not self._pipe.poll(timeout_s):
            raise OperationTimeout(f"The process did not answer within {timeout_s:.0f} s.", "")
        try:
            state, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if state == "failed":
            raise codec.error_of(answer)
        return dict(answer)

    def _lost(self) -> EngineLost:
        self._process.join(5)
        return EngineLost(f"The process ended by itself (exit code {self._process.exitcode}).", "")
