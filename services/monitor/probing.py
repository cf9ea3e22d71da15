"""Golden probes: asks known questions of the fleet like any client, at low priority, and judges the answers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import nats.errors

from services.monitor.decide import probes
from services.monitor.decide.probes import Watched
from services.monitor.trust import Trust
from services.monitor.writer import Writer
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.learn.standing import Standing
from shared.models.fleet import ProbeSection
from shared.tasks import end

TICK_S = 1.0
DEADLINE_S = 60.0


class Probing:
    """Runs in the knowledge owner, when the fleet file lists probes."""

    def __init__(
        self,
        bus: Bus,
        writer: Writer,
        trust: Trust,
        questions: Sequence[ProbeSection],
        cards: Callable[[], Sequence[str]],
        workers: Callable[[], Sequence[m.WorkerState]],
        clock: Callable[[], float],
        log: Any,
    ) -> None:
        self._bus = bus
        self._writer = writer
        self._trust = trust
        self._questions = list(questions)
        self._cards = cards
        self._workers = workers
        self._clock = clock
        self._log = log
        self._routed = 0
        self._judged_at: dict[str, int] = {}
        self._last, self._last_s = 0, clock()
        self._asked: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._questions:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end([self._task])

    def on_route(self, route: m.Route) -> None:
        """A query was routed."""
        self._routed += 1

    def on_judged(self, card: str) -> None:
        """An answer of this card was judged."""
        self._judged_at[card] = self._routed

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            watched = [w for name in self._cards() if self._of(name) for w in (self._watched(name),)]
            spare = not any(engine.held for worker in self._workers() for engine in worker.engines)
            since, since_s = self._routed - self._last, self._clock() - self._last_s
            card = probes.due(watched, since, since_s, spare=spare)
            if card is None:
                continue
            try:
                await self._probe(card)
            except (TimeoutError, nats.errors.Error, OSError, msgspec.MsgspecError) as error:
                self._log.info("probe_unanswered", card=card, error=str(error) or type(error).__name__)
            self._last, self._last_s = self._routed, self._clock()

    async def _probe(self, card: str) -> None:
        questions = self._of(card)
        turn = self._asked[card] = self._asked.get(card, -1) + 1
        question = questions[turn % len(questions)]
        query = m.Query(
            prompt=question.prompt, id=f"probe-{uuid.uuid4().hex}", model=card, max_tokens=question.max_tokens,
            temperature=0.0, priority="lo", deadline_s=DEADLINE_S, metadata={"probe": "golden"},
        )  # fmt: skip
        reply = await self._bus.nc.request(subjects.QUERY, codec.to_json(query), timeout=DEADLINE_S + 5.0)
        answer = codec.from_json(reply.data, m.Answer | m.Failure)  # type: ignore[arg-type]
        if isinstance(answer, m.Failure):
            self._log.info("probe_unanswered", card=card, code=answer.code)
            return
        score = probes.score(answer.text, question.expect)
        row = {
            "query_id": answer.id, "score": score, "label": None, "card": answer.model, "at": self._clock(),
            "source": "probe",
        }  # fmt: skip
        self._writer.note("feedback", row)
        self._trust.on_judged(answer.id, answer.model, score)
        self.on_judged(answer.model)
        self._log.info("probed", card=answer.model, score=score)

    def _of(self, card: str) -> list[ProbeSection]:
        return [q for q in self._questions if not q.cards or card in q.cards]

    def _watched(self, card: str) -> Watched:
        stands = self._trust.standings.get(card, Standing())
        idle = self._routed - self._judged_at.get(card, 0)
        return Watched(card, stands.state == "quarantined", stands.warning, idle)
