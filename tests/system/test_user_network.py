"""A guest whose packets cross no port of the host: its connections are read from its memory, and bound all the same."""

import socket
import time

import pytest

from appliance.tap.netns import call_in_netns
from lab.guest import boot
from lab.image import build
from tests.worlds.command import Watching, parasight

pytestmark = pytest.mark.system

GUEST, FORWARDED, SERVER, SERVICE = "10.77.0.11", 18080, 8000, 8080
PYTHON = ["/usr/bin/python3", "-S", "-E", "-c"]
CALL = f"import socket, time; peer = socket.create_connection(('10.77.0.1', {SERVER})); print('UP', flush=True)"
SERVE = f"import socket, time; server = socket.create_server(('0.0.0.0', {SERVICE})); print('UP', flush=True)"
STAY = "; time.sleep(600)"
ANSWER = "; peer, _ = server.accept()"


def test_a_guest_with_user_networking_is_watched_through_its_memory(network, tmp_path):
    inside = str(network.path())
    forward = f"hostfwd=tcp:127.0.0.1:{FORWARDED}-{GUEST}:{SERVICE}"
    server = call_in_netns(inside, lambda: socket.create_server(("127.0.0.1", SERVER)))
    with server, boot(build("debian-12-cloud"), network, name="slirp-01", user_network=forward) as guest:
        target = f"qemu:{guest.pid}"
        (listed,) = [one for one in parasight("guests", "-o", "jsonl", home=tmp_path).objects if one["vm"] == target]
        assert listed["ports"] == []
        assert any("slirp" in note for note in listed["notes"])
        guest.spawn([*PYTHON, CALL + STAY]).wait_for("UP", 60)  # before the watch begins
        with Watching(target, home=tmp_path) as watching:
            assert any("read from memory every 1 s" in line for line in watching.said), watching.said
            old = wait_for(watching, "out", SERVER)
            guest.spawn([*PYTHON, CALL + STAY]).wait_for("UP", 60)
            guest.spawn([*PYTHON, SERVE + ANSWER + STAY]).wait_for("UP", 60)
            caller = call_in_netns(inside, lambda: socket.create_connection(("127.0.0.1", FORWARDED)))
            new = wait_for(watching, "out", SERVER, but=old)
            came_in = wait_for(watching, "in", SERVICE)
            truth = guest.truth()
            caller.close()
            watching.end()
        assert (old["flow"]["midstream"], new["flow"]["midstream"]) == (True, False)
        for verdict in (old, new, came_in):
            ports = verdict["flow"]["local"]["port"], verdict["flow"]["remote"]["port"]
            (real,) = [one for one in truth.sockets if (one.lport, one.rport) == ports]
            assert verdict["binding"]["match"] == "exact"
            assert [owner["pid"] for owner in verdict["owners"]] == [owner.pid for owner in real.owners]
        assert watching.summary["flows"] >= 3
        assert watching.summary["packets"] == 0


def wait_for(watching, direction, port, *, but=None):
    """The verdict on a connection, once it is there."""
    end = "remote" if direction == "out" else "local"
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        for one in watching.verdicts:
            if one["flow"]["direction"] == direction and one["flow"][end]["port"] == port and one != but:
                return one
        time.sleep(0.05)
    raise AssertionError((direction, port, watching.verdicts, watching.said))
