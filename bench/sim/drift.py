"""A model that gets worse: how soon it is noticed, what it costs, and whether it is taken back when it has recovered.

    python -m bench.sim.drift --learn DIR --judge DIR [--fleet FILE] [--model NAME] [--seeds N] [--json FILE]

Queries of `--judge` are routed one by one among the small models by predicted quality (learned on `--learn`). From
query `--at` on, the accuracy of one model (the one with the most traffic unless named) is halved, and from `--recover`
on it is whole again. A share `--feedback` of the answers is judged; golden probes (queries of `--learn`, whose right
answers are known) are asked beside the traffic as `services.monitor.decide.probes` decides. Losses are against a policy
that knows at once what each model is worth. The stationary runs have no change: any alarm there is a false one. The
last table injects changes of latency, of energy and of the mix of queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import machine, write_json
from bench.sim import arrivals
from bench.sim.__main__ import arguments_of, setting_of
from bench.sim.setting import Setting
from services.monitor.decide import probes
from shared.errors import CalmError, DataInvalid
from shared.learn import edetect, standing
from shared.learn.standing import Standing

Array = NDArray[Any]
WITHIN = 150
"""Judgements of the changed model within which the change is to be noticed."""


@dataclass(frozen=True)
class Stream:
    """n queries for k models, with what each model would earn, and the golden probes."""

    quality: Array
    """[n, k], predicted."""
    score: Array
    """[n, k], before any change."""
    golden_quality: Array
    golden_score: Array


@dataclass(frozen=True)
class Change:
    """The accuracy of `model` is multiplied by `factor` for queries `at` to `until`."""

    model: int
    at: int
    until: int
    factor: float = 0.5

    def share(self, i: int, model: int) -> float:
        return self.factor if model == self.model and self.at <= i < self.until else 1.0


def stream(setting: Setting, count: int, seed: int, *, shift_at: int = 0) -> Stream:
    """The queries of one run; from `shift_at` on they are of three categories only."""
    columns = setting.columns(setting.small)
    rng = np.random.default_rng(seed)
    rows = arrivals.in_any_order(setting.judge, count, rng)
    if shift_at:
        names = rng.choice(sorted({c or "" for c in setting.judge.categories}), 3, replace=False)
        few = np.array([r for r, c in enumerate(setting.judge.categories) if (c or "") in names])
        rows = np.concatenate([rows[:shift_at], rng.choice(few, count - shift_at)])
    golden = rng.permutation(len(setting.learn))
    p = setting.predictions
    return Stream(
        quality=p.quality[rows][:, columns], score=np.nan_to_num(setting.judge.score[rows][:, columns]),
        golden_quality=setting.learned.own.quality[golden][:, columns],
        golden_score=np.nan_to_num(setting.learn.score[golden][:, columns]),
    )  # fmt: skip


def play(s: Stream, change: Change | None, feedback: float, seed: int, *, detect: bool = True) -> dict[str, Any]:
    """Route the whole stream; what happened."""
    rng = np.random.default_rng(seed + 10_000)
    n, k = s.quality.shape
    kept = rng.random((n, 2))  # one draw for whether a halved model still earns its score, one for whether it is judged
    stands = [Standing() for _ in range(k)]
    judged_at: list[int] = [0] * k
    judgements = [0] * k
    log: list[tuple[int, int]] = []
    events: list[dict[str, Any]] = []
    chosen = np.zeros(n, int)
    earned = np.zeros(n)
    golden, asked = 0, 0

    def judge(i: int, model: int, predicted: float, score: float) -> None:
        nonlocal stands
        judgements[model] += 1
        log.append((i, model))
        judged_at[model] = i
        if not detect:
            return
        stands[model], event = standing.judged(stands[model], predicted, score)
        if event is not None:
            events.append({"query": i, "model": model, "event": event, "judgements": judgements[model]})

    def worth(i: int, model: int, score: float, draw: float) -> float:
        return score if change is None or draw < change.share(i, model) else 0.0

    for i in range(n):
        value = np.array([q * stands[j].scale for j, q in enumerate(s.quality[i].tolist())])
        bar = [stand.state == "quarantined" for stand in stands]
        if any(bar) and not all(bar):
            value[bar] = -np.inf
        model = int(np.argmax(value))
        chosen[i] = model
        earned[i] = worth(i, model, float(s.score[i, model]), float(kept[i, 0]))
        if kept[i, 1] < feedback:
            judge(i, model, float(s.quality[i, model]), float(earned[i]))
        if not detect:
            continue
        watch = [
            probes.Watched(str(j), quarantined=bar[j], warning=stands[j].warning, idle=i - judged_at[j])
            for j in range(k)
        ]
        if (name := probes.choose(watch, i)) is not None:
            row, asked = golden % len(s.golden_score), asked + 1
            golden += 1
            probed = int(name)
            score = worth(i, probed, float(s.golden_score[row, probed]), float(rng.random()))
            judge(i, probed, float(s.golden_quality[row, probed]), score)
    return {"chosen": chosen, "earned": earned, "events": events, "judgements": judgements, "log": log, "probes": asked}


def all_knowing(s: Stream, change: Change, seed: int) -> Array:
    """[n] what the policy earns that knows at once what each model is worth."""
    kept = np.random.default_rng(seed + 10_000).random((len(s.quality), 2))[:, 0]
    within = (np.arange(len(s.quality)) >= change.at) & (np.arange(len(s.quality)) < change.until)
    value = s.quality.copy()
    value[within, change.model] *= change.factor
    best = np.argmax(value, axis=1)
    score = s.score[np.arange(len(best)), best]
    lost = within & (best == change.model) & (kept >= change.factor)
    return np.where(lost, 0.0, score)


def returned(events: Sequence[dict[str, Any]], change: Change) -> tuple[bool, int | None]:
    """Whether the model was back before it had recovered, as luck would have it, and stayed; and how many queries after
    its recovery it was trusted again: 0 then, None for never."""
    own = [e for e in events if e["model"] == change.model]
    before = [e["event"] for e in own if e["query"] < change.until]
    if before and before[-1] == "restored":
        return True, 0
    after = next((e for e in own if e["event"] == "restored" and e["query"] >= change.until), None)
    return False, after["query"] - change.until if after else None


def drift_run(setting: Setting, arguments: argparse.Namespace, model: int, seed: int) -> dict[str, Any]:
    """One run with a change and a recovery."""
    s = stream(setting, arguments.queries, seed)
    change = Change(model, arguments.at, arguments.recover)
    ours = play(s, change, arguments.feedback, seed)
    blind = play(s, change, arguments.feedback, seed, detect=False)
    known = all_knowing(s, change, seed)
    inside = slice(change.at, change.until)
    alarm = next(
        (e for e in ours["events"] if e["event"] == "drift" and e["model"] == model and e["query"] >= change.at), None
    )
    early, after_queries = returned(ours["events"], change)
    false = [
        e for e in ours["events"]
        if e["event"] == "drift" and (e["model"] != model or not change.at <= e["query"] < change.until)
    ]  # fmt: skip
    before = sum(1 for at, of in ours["log"] if of == model and at < change.at)
    after = alarm["query"] if alarm else change.until

    def share(begin: int, end: int) -> float:
        return float(np.mean(ours["chosen"][begin:end] == model)) if end > begin else 0.0

    return {
        "seed": seed,
        "noticed_query": alarm["query"] if alarm else None,
        "noticed_after_queries": alarm["query"] - change.at if alarm else None,
        "noticed_after_judgements": alarm["judgements"] - before if alarm else None,
        "share_before": share(0, change.at),
        "share_after_notice": share(after, change.until),
        "share_at_end": share(change.until + (after_queries or 0), arguments.queries),
        "restored_after_queries": after_queries,
        "back_before_recovery": early,
        "false_alarms": len(false),
        "loss": float(known[inside].sum() - ours["earned"][inside].sum()),
        "loss_undetected": float(known[inside].sum() - blind["earned"][inside].sum()),
        "loss_after_recovery": float(known[change.until :].sum() - ours["earned"][change.until :].sum()),
        "accuracy": float(ours["earned"][inside].mean()),
        "accuracy_all_knowing": float(known[inside].mean()),
        "probes": ours["probes"],
    }


def stationary_run(setting: Setting, count: int, feedback: float, seed: int, shift_at: int) -> dict[str, Any]:
    """No model changes; with `shift_at` the mix of queries does."""
    s = stream(setting, count, seed, shift_at=shift_at)
    ours = play(s, None, feedback, seed)
    alarms = [e for e in ours["events"] if e["event"] == "drift"]
    return {"seed": seed, "queries": count, "judgements": int(sum(ours["judgements"])), "false_alarms": len(alarms)}


def signals(setting: Setting, seed: int) -> list[dict[str, Any]]:
    """Changes of latency, of energy and of the mix of queries after 4,000 observations without any."""
    rng = np.random.default_rng(seed)
    column = setting.columns(setting.small)[0]
    rows = arrivals.in_any_order(setting.judge, 6000, rng)
    tokens = np.nan_to_num(setting.judge.tokens_out[rows, column], nan=100.0)
    ratio = np.log(np.maximum(tokens, 1.0) / np.maximum(setting.predictions.tokens_out[rows, column], 1.0))
    found = []
    for name, factor in (("latency x 1.5", 1.5), ("energy x 1.3", 1.3)):
        state, noticed = edetect.Ranks(), None
        for i, value in enumerate(ratio + np.log(factor) * (np.arange(6000) >= 4000)):
            state = edetect.ranked(state, float(value))
            if state.evidence >= edetect.THRESHOLD:
                noticed = i
                break
        found.append({"signal": name, "seed": seed, "noticed_after": None if noticed is None else noticed - 4000})
    names = sorted({c or "" for c in setting.judge.categories})
    few = [r for r, c in enumerate(setting.judge.categories) if (c or "") in names[:3]]
    mix, noticed = edetect.Mix(), None
    order = np.concatenate([rows[:4000], rng.choice(few, 2000)])
    for i, row in enumerate(order):
        mix = edetect.mixed(mix, [(c, float(c == (setting.judge.categories[row] or ""))) for c in names])
        if mix.evidence >= edetect.THRESHOLD:
            noticed = i
            break
    found.append(
        {"signal": "queries of 3 domains", "seed": seed, "noticed_after": None if noticed is None else noticed - 4000}
    )
    return found


def show(result: dict[str, Any]) -> None:
    """Print."""
    print(
        f"accuracy of {result['model']} halved at query {result['at']}, whole again at {result['recover']};"
        f" {result['feedback']:.0%} of answers judged"
    )
    print(
        f"  {'seed':>4}{'noticed after':>24}{'share before':>14}{'after':>8}{'at end':>8}{'restored after':>16}"
        f"{'loss':>8}{'undetected':>12}{'false':>7}{'probes':>8}"
    )
    for r in result["drift"]:
        noticed = (
            f"{r['noticed_after_judgements']} judged, {r['noticed_after_queries']} q" if r["noticed_query"] else "NEVER"
        )
        restored = "NEVER" if r["restored_after_queries"] is None else f"{r['restored_after_queries']} q"
        restored = "before" if r["back_before_recovery"] else restored
        print(
            f"  {r['seed']:4}{noticed:>24}{r['share_before']:14.2f}{r['share_after_notice']:8.2f}"
            f"{r['share_at_end']:8.2f}{restored:>16}{r['loss']:8.1f}{r['loss_undetected']:12.1f}{r['false_alarms']:7}{r['probes']:8}"
        )
    print("  loss: answers lost against the policy that knows at once, while the model is worse;")
    print("  undetected: the same without detection")
    within = [r for r in result["drift"] if (r["noticed_after_judgements"] or 10**9) <= WITHIN]
    whole = [r for r in result["drift"] if r["restored_after_queries"] is not None]
    total = len(result["drift"])
    print(f"noticed within {WITHIN} judgements: {len(within)} of {total}; restored: {len(whole)} of {total}")
    for name in ("stationary", "mix_shift"):
        runs = result[name]
        print(
            f"{name.replace('_', ' ')}: {sum(r['false_alarms'] for r in runs)} false alarms in {len(runs)} runs of"
            f" {runs[0]['queries']} queries ({runs[0]['judgements']} judgements)"
        )
    print("other signals, noticed after so many observations (negative: a false alarm)")
    for name in dict.fromkeys(s["signal"] for s in result["signals"]):
        values = [s["noticed_after"] for s in result["signals"] if s["signal"] == name]
        print(f"  {name:24}" + ", ".join("never" if v is None else str(v) for v in values))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.sim.drift", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE")
    parser.add_argument(
        "--model", metavar="NAME", help="the one that changes; that with the most traffic when left out"
    )
    parser.add_argument("--at", type=int, default=2000)
    parser.add_argument("--recover", type=int, default=6000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--stationary", type=int, default=20_000)
    parser.add_argument("--feedback", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        known = arguments_of(["--learn", str(arguments.learn), "--judge", str(arguments.judge)])
        setting = setting_of(argparse.Namespace(**{**vars(known), **vars(arguments)}))
        if arguments.model and arguments.model not in setting.small:
            raise DataInvalid(f"{arguments.model!r} is no small model.", f"Choose from: {', '.join(setting.small)}.")
    except CalmError as error:
        print(f"bench.sim.drift: {error}", file=sys.stderr)
        sys.exit(2)
    best = np.argmax(setting.predictions.quality[:, setting.columns(setting.small)], axis=1)
    model = setting.small.index(arguments.model) if arguments.model else int(np.bincount(best).argmax())
    seeds = range(arguments.seeds)
    result: dict[str, Any] = {
        "benchmark": "drift", "machine": machine(), "model": setting.small[model], "at": arguments.at,
        "recover": arguments.recover, "feedback": arguments.feedback,
        "drift": [drift_run(setting, arguments, model, seed) for seed in seeds],
        "stationary": [stationary_run(setting, arguments.stationary, arguments.feedback, 100 + s, 0) for s in seeds],
        "mix_shift": [
            stationary_run(setting, arguments.stationary, arguments.feedback, 200 + s, arguments.stationary // 2)
            for s in seeds
        ],
        "signals": [found for seed in seeds for found in signals(setting, seed)],
    }  # fmt: skip
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
