"""The JetStream streams and KV buckets behind the subjects, as data, and the call that makes them so."""

from __future__ import annotations

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, KeyValueConfig, RePublish, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError

from shared import subjects

_DAY_S = 86400.0
_DEDUPE_S = 600.0
_QUEUE_LIMIT = 100_000


def _work_queue(name: str, pattern: str, **more: float) -> StreamConfig:
    return StreamConfig(
        name=name,
        subjects=[pattern],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        discard_new_per_subject=True,
        max_msgs_per_subject=_QUEUE_LIMIT,
        duplicate_window=_DEDUPE_S,
        allow_direct=True,
        max_age=more.get("max_age", 0),
    )


STREAMS: tuple[StreamConfig, ...] = (
    _work_queue(subjects.STREAM_QUERIES, "calm.queries.>"),
    _work_queue(subjects.STREAM_WORK, subjects.ALL_WORK),
    StreamConfig(
        name=subjects.STREAM_COMMANDS,
        subjects=["calm.command.>"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        max_age=120.0,
        duplicate_window=120.0,
    ),
    StreamConfig(
        name=subjects.STREAM_DONE,
        subjects=[subjects.done_of("*")],
        republish=RePublish(*subjects.DONE_TO_INBOX),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        max_age=_DAY_S,
        duplicate_window=_DEDUPE_S,
        allow_direct=True,
    ),
    StreamConfig(
        name=subjects.STREAM_JOURNAL,
        subjects=["calm.decision.>", "calm.journal.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        max_age=_DAY_S,
        duplicate_window=_DEDUPE_S,
    ),
    StreamConfig(
        name=subjects.STREAM_DEAD,
        subjects=[subjects.DEAD],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        max_age=7 * _DAY_S,
    ),
)

WORK_QUEUES = frozenset(stream.name for stream in STREAMS if stream.retention == RetentionPolicy.WORK_QUEUE)

LIVENESS_S = 3.0
"""A worker's entry and a lease expire this long after their last refresh."""

BUCKETS: tuple[KeyValueConfig, ...] = (
    KeyValueConfig(bucket=subjects.BUCKET_FLEET, history=1, direct=True, ttl=LIVENESS_S, storage=StorageType.MEMORY),
    KeyValueConfig(bucket=subjects.BUCKET_LEASES, history=1, direct=True, ttl=LIVENESS_S, storage=StorageType.MEMORY),
    KeyValueConfig(bucket=subjects.BUCKET_MODELS, history=1, direct=True, storage=StorageType.FILE),
    KeyValueConfig(bucket=subjects.BUCKET_CONTROL, history=1, direct=True, storage=StorageType.FILE),
)


async def ensure(js: JetStreamContext) -> None:
    """Create or update every stream and bucket; harmless when called by several services at once."""
    for config in STREAMS:
        try:
            await js.add_stream(config)
        except BadRequestError:  # it exists with another configuration, from an earlier version
            await js.update_stream(config)
    for bucket in BUCKETS:
        await js.create_key_value(bucket)


async def queued(js: JetStreamContext) -> dict[str, int]:
    """Queries dispatched and not yet done, by artifact, from the work queue itself: what is acknowledged is gone.

    Raises:
        TimeoutError, nats.errors.Error: the broker is away.
    """
    info = await js.stream_info(subjects.STREAM_WORK, subjects_filter=subjects.ALL_WORK)
    counts: dict[str, int] = {}
    for subject, count in (info.state.subjects or {}).items():
        artifact = subjects.artifact_of_work(subject)
        counts[artifact] = counts.get(artifact, 0) + count
    return counts
