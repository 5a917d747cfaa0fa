"""`FXLORA_LOGS=graph,passes,select`: log output by topic, in the style of `TORCH_LOGS`."""

from __future__ import annotations

import logging
import os

from fxlora._passes import did_you_mean

log = logging.getLogger("fxlora")

TOPICS = ("graph", "passes", "select")
"""`graph`: every graph after its rewrite, and those that the backend compiles. `passes`: what each pass did, and its time.
`select`: every decision."""


def wanted(topic: str) -> bool:
    """Whether a topic is asked for."""
    return topic in _asked()


def setup() -> None:
    """Show what `FXLORA_LOGS` asks for on standard error; called once at import. Unknown topics are named."""
    asked = _asked()
    if not asked:
        return
    for name in asked:
        if name not in TOPICS:
            log.warning(
                "FXLORA_LOGS: unknown topic '%s'; there is %s.%s", name, ", ".join(TOPICS), did_you_mean(name, TOPICS)
            )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    for name, level in (("fxlora", logging.INFO), ("passes", logging.DEBUG if "passes" in asked else logging.INFO)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)


def _asked() -> list[str]:
    return [name.strip().lower() for name in os.environ.get("FXLORA_LOGS", "").split(",") if name.strip()]
