"""The tap and the hand in the kernel on other kernels than this host's: a guest plays the host, and runs the tests."""

import importlib.util
import io
import json
import shlex
import tarfile
from pathlib import Path

import pytest

from lab.guest import boot
from lab.image import build
from tests.worlds.command import ROOT

pytestmark = pytest.mark.system

LIBRARIES = ("pyroute2", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
ROOMS = ("tap", "flow")
FILES = ("__init__", "errors", "model", "ports", "rtnetlink")

LOAD = """
import json
from appliance.tap.bpf import loader
from appliance.tap.bpf.layout import Transport
told = {}
for transport in Transport:
    for programs in (loader.PROGRAMS, loader.OBSERVE):
        name = f"{transport} {' '.join(programs)}"
        try:
            loader.Loaded(1024, 1 << 16, transport=transport, programs=programs).close()
            told[name] = "loads"
        except Exception as error:
            told[name] = str(error)[-2000:]
print(json.dumps(told))
"""

# Datagrams held and sent on both ways, a connection refused, paused, reset: what a kernel could do differently.
HOLD, RESET = "tests/tap/bpf/test_hold.py::", "tests/tap/bpf/test_reset.py::"
CHOSEN = (
    f"{HOLD}test_datagrams_of_a_released_flow_arrive_in_order_and_unchanged[out-v4]",
    f"{HOLD}test_datagrams_of_a_released_flow_arrive_in_order_and_unchanged[in-v6]",
    f"{HOLD}test_a_blocked_guest_is_refused_at_once_and_nothing_leaves[v4]",
    "tests/tap/bpf/test_hold_payload.py::test_an_established_connection_is_paused_and_resumed[v6]",
    f"{RESET}test_no_other_connection_of_the_same_peer_is_touched",
)


def packed() -> bytes:
    """The rooms that are tried, their tests and what these need: a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in FILES:
            archive.add(ROOT / "appliance" / f"{name}.py", f"appliance/{name}.py")
        for room in ROOMS:
            archive.add(ROOT / "appliance" / room, f"appliance/{room}", filter=without_caches)
        archive.add(ROOT / "tests" / "tap", "tests/tap", filter=without_caches)
        for name in LIBRARIES:
            found = importlib.util.find_spec(name)
            origin = Path(found.origin)
            place = origin.parent if found.submodule_search_locations else origin
            archive.add(place, place.name, filter=without_caches)
    return buffer.getvalue()


def without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


@pytest.fixture(scope="module", params=["debian-12-cloud", "debian-12-cloud-6.12"])
def host(request, network):
    with boot(build(request.param), network, name="host-01", memory_mb=1024) as guest:
        guest.put("/tmp/host.tar.gz", packed())
        guest.put("/tmp/load.py", LOAD.encode())
        unpacked = guest.run("mkdir -p /tmp/host /run/netns && cd /tmp/host && tar xzf /tmp/host.tar.gz", timeout_s=120)
        assert unpacked.returncode == 0, unpacked.stderr
        yield guest


def python(host, words: str, timeout_s: float):
    return host.run(f"cd /tmp/host && PYTHONPATH=/tmp/host exec /usr/bin/python3 -S {words}", timeout_s=timeout_s)


def test_every_form_of_the_program_loads_on_the_kernels_of_the_lab(host):
    done = python(host, "/tmp/load.py", 180)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 4
    assert set(told.values()) == {"loads"}, told


def test_connections_are_held_released_refused_and_reset_there(host, capsys):
    options = "-m pytest -q -c /dev/null --rootdir=/tmp/host -p no:cacheprovider --import-mode=importlib"
    done = python(host, f"{options} {' '.join(map(shlex.quote, CHOSEN))}", 280)
    with capsys.disabled():
        print("\n" + done.stdout[-100:].strip())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
