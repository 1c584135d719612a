"""Fixtures that several folders share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.families import FamilyBases

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach out
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


LONGEST = ("prefect", "tests/flows/test_deployment.py", "tests/training/loop/test_sharding.py",
           "tests/training/adapter/test_text_encoders.py", "tests/training/loop/test_run_options.py")  # fmt: skip
"""Groups that begin first, so that no process is left alone with one of them."""


def group_of(nodeid: str) -> str:
    """The tests of a group run in one process: those of a file share what they make, and those that call flows share
    the Prefect server, which takes ten seconds to start."""
    file = nodeid.split("::")[0]
    return "prefect" if file.startswith("tests/flows/") and not file.endswith("test_deployment.py") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Marks of groups do nothing: pytest 9.2 does not notice how xdist 3.8 adds them to the names of tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def pytest_collection_finish() -> None:
    """Full garbage collections go through all that lives, which is mostly imports: a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()


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
