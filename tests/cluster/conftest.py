"""Tests on several hosts: they share one lab, and each finds it as if it were new.

Where no lab can be made they are left out, or fail where DISTCLIP_REQUIRE_CLUSTER=1 says that one can.
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
    """Four hosts, from the first test that needs them to the last."""
    why = unavailable()
    if why is not None and os.environ.get("DISTCLIP_REQUIRE_CLUSTER") == "1":
        pytest.fail(why)
    if why is not None:
        pytest.skip(why)
    with Lab() as one:
        yield one


@pytest.fixture(autouse=True)
def as_new(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, nothing runs on the hosts and nothing is wrong with them."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").reset()
