"""What a GPU takes to load, hold, read and write with models of real shapes: times, bytes, joules, and a profile.

    python -m bench.gpu [--shape NAME ...] [--precision fp16 int8-fp16 int4-fp16] [--batch 1 2 4 ... 64] [--json FILE]
    python -m bench.gpu --device cpu --shape tiny

Weights are random, made here (`bench.shapes`); nothing is fetched. Each model is measured in a process of its own, with
and without CUDA graphs; then the smallest several times over, in processes of their own and in one, which is what is to
decide whether engines should share a process (docs/gpu.md). What was measured becomes `profiles/NAME.toml`, for the
simulator: without graphs, as engines run by default, and `NAME-graphs.toml` with them. On a CPU it runs too, to be
tried: nothing is captured there, and joules are estimated where they cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from bench.gpu_process import Process
from bench.gpu_profile import PROFILES, write_profiles
from bench.gpu_tables import show
from bench.report import machine, print_machine, write_json
from bench.shapes import SHAPES, make, slug
from services.workers import device as devices
from services.workers import gpu
from shared.errors import CalmError, DeviceUnavailable
from shared.messages import Device
from shared.models.manifest import artifact_name
from shared.settings import Settings, format_bytes

HALF = ("fp16", "int8-fp16", "int4-fp16")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SETTLE_S = 5.0
LOOK_S = 0.05
STEADY_BYTES = 1 << 20

Used = Callable[[Sequence[Process]], int]
"""Bytes of memory that are in use, of the device or of these processes."""


def say(text: str) -> None:
    """Progress: tables come last."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def meter_of(device: Device, visible: str | None) -> tuple[Used, str]:
    """What tells how much memory is in use, and the driver's version."""
    if device.kind == "cpu":
        return lambda processes: sum(map(_pss, processes)), ""
    import pynvml  # noqa: PLC0415 only useful on machines with a GPU

    pynvml.nvmlInit()
    handle = gpu.handle_of(pynvml, device.index, visible)
    version = pynvml.nvmlSystemGetDriverVersion()
    driver = version.decode() if isinstance(version, bytes) else str(version)
    return lambda _processes: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), driver


def _pss(process: Process) -> int:
    try:
        return int(psutil.Process(process.pid).memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0


class Bench:
    """One device, and what is measured on it."""

    def __init__(self, arguments: argparse.Namespace, device: Device, visible: str | None) -> None:
        self.asked = arguments
        self.device = device
        self.used, self.driver = meter_of(device, visible)
        self.energy = ""

    def settled(self, processes: Sequence[Process] = ()) -> int:
        """Bytes in use, once they no longer change: a driver takes a while to give back what a process had."""
        ends, before = time.monotonic() + SETTLE_S, self.used(processes)
        while time.monotonic() < ends:
            time.sleep(LOOK_S)
            now = self.used(processes)
            if abs(now - before) <= STEADY_BYTES:
                return now
            before = now
        return before

    def process(self) -> Process:
        process = Process(self.device)
        self.energy = process.energy
        return process

    def model(self, store: Path, shape: str, precision: str, *, graphs: bool) -> dict[str, Any]:
        """Load, read, write and evict one model, in a process of its own."""
        asked, name = self.asked, f"{shape} {precision}{' with graphs' if graphs else ''}"
        empty = self.settled()
        process = self.process()
        found: dict[str, Any] = {
            "shape": shape, "precision": precision, "graphs": graphs, "process_s": process.start_s,
            "artifact": artifact_name(slug(shape), precision),
        }  # fmt: skip
        try:
            found |= process.ask(
                "open", key="x", store=str(store), model=slug(shape), variant=precision, context=asked.context,
                graphs=graphs,
            )  # fmt: skip
            found["held_bytes"] = self.settled([process]) - empty
            say(f"{name}: ready in {process.start_s + found['ready_s']:.2f} s, {format_bytes(found['held_bytes'])}")
            if graphs and not found["captures"]:
                found["refused"] = "ONNX Runtime captures no graphs of this model (cuda_graphs_off in the log)."
                say(f"{name}: {found['refused']}")
                return found
            found["prefill"] = process.ask("prefill", key="x", tokens=asked.prompt_tokens, seconds=asked.seconds)
            say(f"{name}: reads {found['prefill']['tokens_per_s']:.0f} tokens/s")
            found["decode"] = []
            for batch in asked.batch:
                if not self._decode(process, found, name, batch):
                    break
                found["decode"][-1]["bytes"] = found["most_bytes"] = self.settled([process]) - empty
            rows = max((one["batch"] for one in found["decode"]), default=0)
            found["counted_bytes"] = found["weights_bytes"] + rows * asked.context * found["kv_bytes_per_token"]
        except CalmError as error:
            found["error"] = str(error)
            say(f"{name}: {error}")
        finally:
            holding = self.used([process])
            found["evict_s"] = process.end()
            found["given_back"] = (holding - self.settled()) / max(holding - empty, 1)
        return found

    def _decode(self, process: Process, found: dict[str, Any], name: str, batch: int) -> bool:
        """One number of sequences; False when that many cannot be had, and more cannot either."""
        asked = self.asked
        try:
            one = process.ask(
                "decode", key="x", batch=batch, prompt_tokens=min(asked.prompt_tokens, asked.decode_prompt),
                context=asked.context, seconds=asked.seconds,
            )  # fmt: skip
        except CalmError as error:
            found["stopped_at"] = {"batch": batch, "error": str(error)}
            say(f"{name}: not {batch} at once: {error}")
            return False
        found["decode"].append(one)
        say(f"{name}: {batch} at once, {one['tokens_per_s']:.1f} tokens/s, {one['token_j']:.3g} J a token")
        return True

    def together(self, store: Path, shape: str, precision: str) -> dict[str, Any]:
        """The same model several times: each in a process of its own, and all in one."""
        count = self.asked.together
        more = {
            "store": str(store), "model": slug(shape), "variant": precision, "context": self.asked.context,
            "graphs": False,
        }  # fmt: skip
        empty = self.settled()
        with contextlib.ExitStack() as ending:
            apart: list[Process] = []
            alone_s = []
            for number in range(count):
                process = self.process()
                ending.callback(process.end)
                apart.append(process)
                if number == 0:
                    process.ask("context")
                    context_bytes = self.settled(apart) - empty
                answer = process.ask("open", key="x", **more)
                alone_s.append(process.start_s + answer["ready_s"])
            apart_bytes = self.settled(apart) - empty
        say(f"{count} x {shape} {precision} in processes of their own: {format_bytes(apart_bytes)}")
        empty, bytes_after = self.settled(), []
        process = self.process()
        try:
            seconds = []
            for number in range(count):
                seconds.append(process.ask("open", key=str(number), **more)["ready_s"])
                bytes_after.append(self.settled([process]) - empty)
            closing_s = process.ask("close", key=str(count - 1))["seconds"]
            kept = self.settled([process]) - empty
        finally:
            process.end()
        say(f"{count} x {shape} {precision} in one process: {format_bytes(bytes_after[-1])}")
        one_bytes = bytes_after[-1] - bytes_after[-2]
        return {
            "shape": shape, "precision": precision, "count": count, "context_bytes": context_bytes,
            "apart_bytes": apart_bytes, "one_bytes": bytes_after[-1], "model_bytes": one_bytes,
            "saved_bytes": (apart_bytes - bytes_after[-1]) / (count - 1),
            "apart_load_s": min(alone_s), "one_load_s": min(seconds[1:]), "close_s": closing_s,
            "close_gives_back": (bytes_after[-1] - kept) / max(one_bytes, 1),
        }  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all that is asked for.

    Raises:
        DeviceUnavailable: there is no such device, or ONNX Runtime cannot use it.
    """
    settings = replace(Settings.from_env(), device=arguments.device)
    bench = Bench(arguments, devices.probe(settings), settings.cuda_visible_devices)
    models: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "machine": machine(), "device": bench.device.name, "kind": bench.device.kind, "driver": bench.driver,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "energy": "", "models": models, "together": {},
    }  # fmt: skip
    print_machine(result["machine"])
    say(f"device: {bench.device.name}{f', driver {bench.driver}' if bench.driver else ''}")
    with contextlib.ExitStack() as ending:
        store = arguments.store or Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="calm-gpu-")))
        for shape in arguments.shape:
            say(f"{shape}: making {', '.join(arguments.precision)}")
            make(shape, store, arguments.precision)
            for precision in arguments.precision:
                for graphs in {"both": (False, True), "on": (True,), "off": (False,)}[arguments.graphs]:
                    models.append(bench.model(store, shape, precision, graphs=graphs))
                    result["energy"] = bench.energy
                    if arguments.json:  # what has been measured is not lost by what comes after it
                        write_json(arguments.json, result)
            if arguments.store is None:
                _make_room(store, models)
        least = _smallest(models)
        if least is not None and arguments.together > 1:
            try:
                result["together"] = bench.together(store, least["shape"], least["precision"])
            except CalmError as error:
                say(f"several models in one process: {error}")
    return result


def _smallest(models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return min((one for one in models if "held_bytes" in one), key=lambda one: int(one["held_bytes"]), default=None)


def _make_room(store: Path, models: Sequence[dict[str, Any]]) -> None:
    """All shapes in three precisions would take 75 GB; only the smallest is needed again."""
    least = _smallest(models)
    for shape in {one["shape"] for one in models} - {least["shape"] if least else ""}:
        shutil.rmtree(store / slug(shape), ignore_errors=True)


def arguments_of(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try it")
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=shapes, metavar="NAME", help=str(shapes))
    parser.add_argument("--precision", nargs="+", choices=HALF, default=list(HALF))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="sequences at once")
    parser.add_argument("--graphs", choices=("both", "on", "off"), default="both")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of prompts that are read alone")
    parser.add_argument("--decode-prompt", type=int, default=128, help="most of those before decoding")
    parser.add_argument("--context", type=int, default=1024, help="tokens that a row can hold")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement; NVML counts ten times a second"
    )
    parser.add_argument("--together", type=int, default=3, help="models in one process; 0 to leave that out")
    parser.add_argument("--store", type=Path, help="where to make and keep the models; else a temporary folder")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder of the profile that is written")
    parser.add_argument("--name", help="of the profile; made of the device's when not given")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    arguments.batch = sorted({1, *arguments.batch})
    if arguments.context <= arguments.decode_prompt + 2 * arguments.batch[-1] + 8:
        parser.error("--context is too short for so many sequences: each waits while the others' prompts are read")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = arguments_of(given)
    try:
        result = run(arguments)
        if arguments.json:
            write_json(arguments.json, result)
        show(result)
        name = arguments.name or re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        for path in write_profiles(result, arguments.profiles, name):
            say(f"wrote {path}")
    except CalmError as error:
        trying = " To try the bench: --device cpu --shape tiny." if isinstance(error, DeviceUnavailable) else ""
        sys.exit(f"{error.code}: {error}{trying}")


if __name__ == "__main__":
    main()
