"""The analyzer's shell: each accepted query becomes a profile; each second the fleet is looked over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec
import structlog
from nats.aio.msg import Msg

from services.analyzer.decide import profile, symptoms
from services.analyzer.decide.profile import Vectors
from services.analyzer.embedding import EmbeddingQueue
from services.analyzer.tokens import TokenCounter
from shared import codec, subjects, tasks
from shared import messages as m
from shared.puller import Puller
from shared.runtime import Context
from shared.views import FleetView, ModelsView

OpenEmbedder = Callable[[m.Policy], Callable[[list[str]], Vectors]]
"""Opens the embedding model that the policy names; the result embeds texts [n] to float32 [n, hidden]."""

PRIOR_TOKENS_OUT = 128.0
"""Expected answer length before any has been seen."""


class Analyzer:
    """`calm.queries.new` to `calm.queries.analyzed`, and symptoms to `calm.symptom.*`."""

    def __init__(self, context: Context, open_embedder: OpenEmbedder) -> None:
        self._context = context
        self._open_embedder = open_embedder
        self._bus = context.bus
        self._log = context.log
        self._queue: EmbeddingQueue
        sample = "\n".join(text for _, text in profile.prototype_texts())
        self._tokens = TokenCounter(context.settings.models_path, sample)
        self._models = ModelsView(self._bus, on_change=self._on_models)
        self._models_changed = asyncio.Event()
        self._fleet = FleetView(self._bus)
        self._prototypes: dict[str, Vectors] = {}
        self._known = profile.references({}, {})
        self._qos = m.Qos()
        self._alive: frozenset[str] = frozenset()
        self._reported: set[tuple[str, str]] = set()
        self._background: list[asyncio.Task[None]] = []
        self._puller = Puller(
            self._bus,
            stream=subjects.STREAM_QUERIES,
            durable="analyzer",
            subject=subjects.NEW,
            handler=self._on_query,
            limit=64,
            log=self._log,
        )
        context.health.in_flight = lambda: self._puller.in_flight

    async def start(self) -> None:
        await self._bus.subscribe(subjects.QOS, self._on_qos)
        await self._models.start()
        await self._fleet.start()
        self._log.info("waiting_for_fleet")
        await self._models.ready.wait()
        assert self._models.policy is not None
        policy = self._models.policy
        embed = await asyncio.to_thread(self._open_embedder, policy)
        self._queue = EmbeddingQueue(embed, quick=policy.embedder_variant == "static")
        await self._embed_prototypes()
        await self._embed_cards()
        await self._rehearse()
        self._background = [
            asyncio.create_task(self._follow_models()),
            asyncio.create_task(self._look_over()),
        ]
        await self._puller.start()

    async def stop(self) -> None:
        await self._puller.stop(self._context.settings.drain_s)
        await tasks.end(self._background)
        if self._background:
            self._queue.close()

    # --- per query ---

    async def _on_query(self, message: Msg) -> None:
        try:
            accepted = codec.unpack(message.data, m.Accepted)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            now = self._context.clock()
            await self._bus.dead(message.subject, message.data, str(error), service="analyzer", at=now)
            await message.term()
            return
        with structlog.contextvars.bound_contextvars(query_id=accepted.query_id):
            analyzed = await self._analyze(accepted)
            await self._bus.publish(subjects.ANALYZED, analyzed, msg_id=f"{accepted.query_id}-analyzed")
            await message.ack()
            self._context.health.handled += 1
            best = max(analyzed.profile.domains.items(), key=lambda item: item[1], default=("", 0.0))
            self._log.debug("analyzed", domain=best[0], probability=best[1])

    async def _analyze(self, accepted: m.Accepted) -> m.Analyzed:
        query = accepted.query
        text = profile.query_text(query)
        vector = await self._queue.embed(text)
        full = profile.full_text(query)
        if len(full) > 20_000:  # long texts take milliseconds to tokenize: off the event loop
            tokens = await asyncio.to_thread(self._tokens.count, full)
        else:
            tokens = self._tokens.count(full)
        result = profile.make_profile(
            text=text,
            embedding=vector,
            known=self._known,
            tokens_in=tokens,
            tokens_out=PRIOR_TOKENS_OUT,
        )
        stamped = msgspec.structs.replace(accepted, stamps=m.stamp(accepted.stamps, analyzed=self._context.clock()))
        return m.Analyzed(accepted=stamped, profile=result)

    async def _rehearse(self) -> None:
        """Analyse some sentences of our own, so that the first query does not find everything cold."""
        for _, text in profile.prototype_texts():
            accepted = m.Accepted(query=m.Query(prompt=text), query_id="rehearsal", deadline_at=0.0)
            codec.pack(await self._analyze(codec.unpack(codec.pack(accepted), m.Accepted)))

    # --- knowledge ---

    async def _embed_prototypes(self) -> None:
        labelled = profile.prototype_texts()
        vectors = await self._queue.embed_all([text for _, text in labelled])
        for name in dict.fromkeys(domain for domain, _ in labelled):
            rows = [row for row, (domain, _) in enumerate(labelled) if domain == name]
            self._prototypes[name] = vectors[rows]

    async def _embed_cards(self) -> None:
        cards = list(self._models.cards.values())
        vectors = {card.name: await self._queue.embed_all(profile.texts_of(card)) for card in cards}
        await asyncio.to_thread(self._tokens.use, cards)
        self._known = profile.references(vectors, self._prototypes)
        self._log.info("cards_embedded", cards=len(cards))

    def _on_models(self) -> None:
        self._models_changed.set()

    async def _follow_models(self) -> None:
        while True:
            await self._models_changed.wait()
            self._models_changed.clear()
            await self._embed_cards()

    async def _on_qos(self, message: Msg) -> None:
        self._qos = codec.unpack(message.data, m.Qos)

    # --- the fleet ---

    async def _look_over(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            policy = self._models.policy
            if policy is None:
                continue
            alive = frozenset(w.worker for w in self._fleet.workers())
            found = symptoms.find(self._qos, policy, self._alive, alive, self._context.clock())
            # A worker that said it was leaving is not lost.
            self._alive = frozenset(w.worker for w in self._fleet.workers() if not w.draining)
            current: set[tuple[str, str]] = {(s.kind, s.subject) for s in found}
            for symptom in found:
                if (symptom.kind, symptom.subject) not in self._reported:
                    self._log.warning("symptom", kind=symptom.kind, subject=symptom.subject, detail=symptom.detail)
                    with contextlib.suppress(ConnectionError):
                        await self._bus.send(subjects.symptom(symptom.kind), symptom)
            self._reported = current
