"""Fixtures of the tests of training."""

import pytest

from tests.families import FamilyBases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> FamilyBases:
    """Tiny models of every family."""
    return FamilyBases(tmp_path_factory.mktemp("families"))
