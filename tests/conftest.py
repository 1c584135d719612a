"""Fixtures that several folders share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.families import FamilyBases

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach out
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """How the tests are divided among processes (`make test`): a file stays together, for what its tests share, and all
    that need the Prefect server do, for it takes 20 seconds to start. They come first: nothing else is as long."""
    items.sort(key=lambda item: not _needs_server(item))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group("prefect" if _needs_server(item) else item.nodeid.split("::")[0]))


def pytest_collection_finish() -> None:
    """Full garbage collections go through all that lives, which is mostly imports: a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()


def _needs_server(item: pytest.Item) -> bool:
    return "prefect_server" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset file of a tiny random-weight world."""
    from tests.tiny import save_world

    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> "FamilyBases":
    """Tiny models of every family."""
    from tests.families import FamilyBases

    return FamilyBases(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A throw-away Prefect server for flows called in this process."""
    from prefect.testing.utilities import prefect_test_harness

    from tests.flows.quiet import SERVICES, quiet

    with pytest.MonkeyPatch.context() as patch:
        for service in SERVICES:
            patch.setenv(f"PREFECT_SERVER_SERVICES_{service}_ENABLED", "false")
        with prefect_test_harness(server_startup_timeout=180), quiet():
            yield
