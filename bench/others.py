"""How much of the cores other processes take while something is measured. Engines run in the idle class of the
scheduler, so that whatever else runs takes the cores from them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Used:
    """Seconds of cores since the machine, and each of our sessions, began."""

    idle_s: float
    all_s: float
    own_s: float

    def others(self, before: Used) -> float:
        """Share of all cores' time since `before` that went to processes that are not ours, and to hosts' others."""
        spent = self.all_s - before.all_s
        busy = spent - (self.idle_s - before.idle_s) - (self.own_s - before.own_s)
        return max(busy / spent, 0.0) if spent > 0.0 else 0.0


def used() -> Used:
    """As of now. Ours are this process, its descendants, and all in a session that one of them leads or is in."""
    times = psutil.cpu_times()
    idle = float(times.idle + getattr(times, "iowait", 0.0))
    # Guests' time is part of users' time on Linux.
    everything = float(sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))
    me = psutil.Process()
    mine = {one.pid for one in (me, *me.children(recursive=True))}
    sessions = {sid for pid in mine - {me.pid} if (sid := _session(pid))} - {_session(me.pid)}
    own = 0.0
    for process in psutil.process_iter():
        if process.pid in mine or _session(process.pid) in sessions:
            try:
                t = process.cpu_times()
            except psutil.Error:
                continue
            # Of children that have ended and were waited for, too; of this process's own, not what was before.
            own += t.user + t.system + t.children_user + t.children_system
    return Used(idle, everything, own)


def _session(pid: int) -> int:
    """0 where it has ended, or where there are no sessions."""
    try:
        return os.getsid(pid)
    except (OSError, AttributeError):
        return 0
