"""`calm energy`: where the joules went, by worker and model, and whether the accounts add up to the meter."""

from __future__ import annotations

import math

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings

J_PER_KWH = 3.6e6
_SOURCES = {
    "nvml": "measured by the GPU's energy counter (NVML)",
    "rapl": "measured by the processor's energy counters (RAPL)",
    "model": "ESTIMATED from stated powers (CALM_POWER_IDLE_W, CALM_POWER_CORE_W), not measured",
}


async def energy(settings: Settings, *, as_json: bool) -> int:
    """Print the energy ledger."""
    bus = await Bus.connect(settings, "calm-energy", wait=False)
    try:
        reports = await bus.ask(subjects.knowledge("energy"), m.KnowledgeRequest(), m.EnergyReports, 5.0)
    finally:
        await bus.close()
    print(codec.to_json(reports).decode() if as_json else render(reports, settings.carbon_g_per_kwh))
    return 0


def render(reports: m.EnergyReports, carbon_g_per_kwh: float = 0.0) -> str:
    """The ledger as text. `carbon_g_per_kwh` 0 leaves carbon out."""
    if not reports.workers:
        return "No worker has reported any energy yet: they do so every five seconds."
    lines: list[str] = []
    for worker in reports.workers:
        lines += _worker(worker, carbon_g_per_kwh)
    if len(reports.workers) > 1:
        total_j = math.fsum(worker.total_j for worker in reports.workers)
        lines.append(f"all workers: {joules(total_j)}{carbon(total_j, carbon_g_per_kwh)}")
        lines += _doubled(reports)
    return "\n".join(lines)


def residual_j(worker: m.EnergyReport) -> float:
    """Joules by the meter that stand in no account."""
    held = [account.active_j + account.load_j for account in worker.accounts]
    return worker.total_j - math.fsum([*held, worker.idle_j, worker.other_j])


def overhead(worker: m.EnergyReport, account: m.EnergyAccount) -> float:
    """Joules of an artifact that no answer is charged with: its loads, and a part of the idling by its activity."""
    active_j = math.fsum(a.active_j for a in worker.accounts)
    share = account.active_j / active_j if active_j else 0.0
    return account.load_j + share * worker.idle_j


def joules(amount: float) -> str:
    """For people: `12.3 J`, `4.56 kJ`, `7.89 MJ`."""
    for size, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if abs(amount) >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.3g} J"


def carbon(amount_j: float, g_per_kwh: float) -> str:
    """The grams of CO2 behind an amount, in brackets; empty where no intensity is set."""
    return f" ({amount_j / J_PER_KWH * g_per_kwh:.3g} g CO2 at {g_per_kwh:g} g/kWh)" if g_per_kwh else ""


def _worker(worker: m.EnergyReport, carbon_g_per_kwh: float) -> list[str]:
    mark = "~" if worker.source == "model" else ""
    lines = [
        f"{worker.worker} on {worker.device_class} ({worker.host}): {_SOURCES[worker.source]}",
        f"  {'model':28}{'active':>11}{'in answers':>12}{'loads':>16}{'answers':>9}{'an answer':>11}{'all in':>11}",
    ]
    for account in worker.accounts:
        each = account.answers_j / account.answers if account.answers else 0.0
        whole = (account.active_j + overhead(worker, account)) / account.answers if account.answers else 0.0
        loads = f"{mark}{joules(account.load_j)} in {account.loads}"
        lines.append(
            f"  {account.artifact:28}{mark + joules(account.active_j):>11}{mark + joules(account.answers_j):>12}"
            f"{loads:>16}{account.answers:9}{mark + joules(each):>11}{mark + joules(whole):>11}"
        )
    held_j = math.fsum(account.active_j + account.load_j for account in worker.accounts)
    unanswered_j = math.fsum(account.active_j - account.answers_j for account in worker.accounts)
    parts = [f"models {mark}{joules(held_j)}", f"idle {mark}{joules(worker.idle_j)}"]
    if worker.other_j:
        parts.append(f"other processes {mark}{joules(worker.other_j)}")
    left_j = residual_j(worker)
    share = left_j / worker.total_j if worker.total_j else 0.0
    if unanswered_j < 0:  # answers are charged at once, by the power of the work before
        rest = f"answers were charged {mark}{joules(-unanswered_j)} more than was active: later work makes up for it"
    else:
        why = "cancelled, failed, not readable, still running, rounding"
        rest = f"active and in no answer ({why}): {mark}{joules(unanswered_j)}"
    return [
        *lines,
        f"  accounts: {', '.join(parts)}",
        f"  meter: {mark}{joules(worker.total_j)} in {worker.elapsed_s:.0f} s"
        f"{carbon(worker.total_j, carbon_g_per_kwh)}; residual {joules(left_j)} ({share:.2%})",
        f"  {rest}",
    ]


def _doubled(reports: m.EnergyReports) -> list[str]:
    """Workers whose counters may be one and the same."""
    seen: dict[tuple[str, str], list[str]] = {}
    for worker in reports.workers:
        if worker.source != "nvml":
            seen.setdefault((worker.host, worker.source), []).append(worker.worker)
    return [
        f"note: {', '.join(names)} share the host {host}: each counts its idling, so that their sum does more than once"
        for (host, _), names in seen.items()
        if len(names) > 1
    ]
