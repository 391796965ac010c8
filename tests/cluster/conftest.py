"""Tests on several hosts: they share one lab, and each gets it as new.

Where no lab can be made they are skipped, or fail if DISTCLIP_REQUIRE_CLUSTER=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster.lab import Lab, unavailable


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.launches)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Four hosts, from the first test that uses them to the last."""
    why = unavailable()
    if why is not None and os.environ.get("DISTCLIP_REQUIRE_CLUSTER") == "1":
        pytest.fail(why)
    if why is not None:
        pytest.skip(why)
    with Lab() as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def as_new(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, end all processes on the hosts and take all faults back."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").reset()
