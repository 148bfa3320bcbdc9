"""What the tests share. Real guests are booted once per module: two cores serve everything."""

import os
from collections.abc import Iterator

import pytest

from lab.guest import Guest, boot
from lab.image import build
from lab.network import Network
from lab.world import World


def pytest_collection_modifyitems(items):
    """The one place that asks for root. In continuous integration nothing is skipped: there a missing root fails."""
    if os.geteuid() == 0 or os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("system"):
            item.add_marker(pytest.mark.skip(reason="needs root: boots guests in network namespaces"))
        elif (marker := item.get_closest_marker("root")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs root: {marker.args[0]}"))


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made, World(made):
        yield made


@pytest.fixture(scope="module")
def guest(network: Network) -> Iterator[Guest]:
    """The usual guest: 6.1 cloud kernel, 1 GiB."""
    with boot(build("debian-12-cloud"), network, name="web-01") as booted:
        yield booted
