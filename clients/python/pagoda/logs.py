"""Structured logs: one JSON object a line, or coloured lines on a terminal. Prompt text never enters them."""

from __future__ import annotations

import logging
import sys

import structlog


def setup(service: str, level: str = "info") -> structlog.stdlib.BoundLogger:
    """Configure logging of this process once; returns its logger, bound to the service's name."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise SystemExit(f"error: --log-level: {level!r} is not debug, info, warning or error")
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line in one piece
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING), format="%(message)s")
    return structlog.get_logger().bind(service=service)  # type: ignore[no-any-return]
