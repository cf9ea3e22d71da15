"""Structured JSON logs on standard error; the query id is bound to the context of the task that handles it."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(service: str, instance: str, level: str = "info") -> structlog.stdlib.BoundLogger:
    """Set up logging for this process and return its logger, bound to the service and instance names."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger().bind(service=service, instance=instance)
    return logger
