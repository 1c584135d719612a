"""Prefect's settings for flows that run in the tests."""

from contextlib import AbstractContextManager
from typing import Any

SERVICES = (
    "TASK_RUN_RECORDER", "EVENT_PERSISTER", "TRIGGERS", "SCHEDULER", "LATE_RUNS", "FOREMAN", "CANCELLATION_CLEANUP",
)  # fmt: skip
"""Of a server that only runs flows when they are called: what schedules, cleans up, or writes down what nobody reads
(while the recorder writes, SQLite makes a flow wait, two seconds at times)."""


def quiet(api_url: str | None = None) -> AbstractContextManager[Any]:
    """No heartbeats (a flow's end waits up to two seconds for the thread that sends them), no logs at the server.

    api_url: of the server, if it is not the one of the settings.
    """
    from prefect import settings

    changes: dict[Any, Any] = {
        settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        settings.PREFECT_LOGGING_TO_API_ENABLED: False,
    }
    return settings.temporary_settings(changes | ({settings.PREFECT_API_URL: api_url} if api_url else {}))
