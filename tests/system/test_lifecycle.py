"""A guest that starts, reboots or gets another network card goes on being seen without anybody's help."""

import time

import pytest

from lab.guest import boot
from lab.image import build
from tests.worlds.command import Watching

pytestmark = pytest.mark.system

CALL = "/usr/bin/python3 -c 'import socket, time; s = socket.create_connection((\"10.77.0.1\", 7000)); time.sleep(1)'"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A watch of whatever runs here, begun before the guest."""
    with Watching(home=tmp_path_factory.mktemp("host")) as watch:
        yield watch


@pytest.fixture(scope="module")
def guest(network, host):
    with boot(build("debian-12-cloud"), network, name="web-01") as booted:
        yield booted


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def calls(watch):
    return [body for body in watch.verdicts if body["flow"]["remote"]["port"] == 7000]


def test_a_guest_that_starts_while_its_host_is_watched_is_seen_from_its_start_and_its_processes_are_named(guest, host):
    def said(text):
        return [line for line in host.said if line.startswith(f"qemu:{guest.pid}: ") and text in line]

    wait_for(lambda: said("attached in"), 60)
    assert host.said.index(said("under watch (web-01)")[0]) < host.said.index(said("attached in")[0])
    guest.run(CALL)
    wait_for(lambda: calls(host), 20)
    host.end()
    (body,) = calls(host)
    assert (body["vm"], body["binding"]["match"], body["process"]["name"]) == (f"qemu:{guest.pid}", "exact", "python3")


def test_after_a_reboot_the_new_kernel_is_attached_and_its_processes_are_named(guest, tmp_path):
    with Watching(f"qemu:{guest.pid}", home=tmp_path) as watch:
        guest.run(CALL)
        wait_for(lambda: calls(watch), 20)
        guest.qmp("set-action", reboot="reset")
        guest.qmp("system_reset")
        wait_for(lambda: guest.agent.hello(0.5), 120)
        wait_for(lambda: any("attached again" in line for line in watch.said), 60)
        before = len(calls(watch))
        guest.run(CALL)
        wait_for(lambda: len(calls(watch)) > before, 20)
        watch.end()
    for body in (calls(watch)[0], calls(watch)[-1]):
        assert body["binding"]["match"] == "exact", body
        assert body["process"]["name"] == "python3"


def job(guest, command, **arguments):
    """Run a block job of QEMU to its end."""
    guest.qmp(command, **{"job-id": "job", **arguments})

    def ended():
        (one,) = [one for one in guest.qmp("query-jobs") if one["id"] == "job"]
        assert "error" not in one, one
        return one["status"] == "concluded"

    wait_for(ended, 60)
    guest.qmp("job-dismiss", id="job")


def test_a_revert_to_a_snapshot_of_which_nobody_tells_is_noticed_and_everything_looked_at_afresh(guest, tmp_path):
    disk = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk.qcow2")}
    job(guest, "blockdev-create", options={"driver": "file", "filename": disk["filename"], "size": 0})
    guest.qmp("blockdev-add", **disk)
    job(guest, "blockdev-create", options={"driver": "qcow2", "file": "file", "size": 4 << 30})
    guest.qmp("blockdev-add", driver="qcow2", file="file", **{"node-name": "disk"})
    snapshot = {"tag": "before", "vmstate": "disk", "devices": ["disk"]}
    with Watching(f"qemu:{guest.pid}", home=tmp_path) as watch:
        job(guest, "snapshot-save", **snapshot)
        guest.run(CALL)
        wait_for(lambda: calls(watch), 20)
        time.sleep(3)  # nobody can see when its pulse is felt, once a second
        guest.qmp("stop")
        job(guest, "snapshot-load", **snapshot)
        guest.qmp("cont")
        wait_for(lambda: any("it went back in time" in line for line in watch.said), 60)
        wait_for(lambda: any("attached again" in line for line in watch.said), 60)
        wait_for(lambda: guest.agent.hello(0.5), 120)
        before = len(calls(watch))
        guest.run(CALL)
        wait_for(lambda: len(calls(watch)) > before, 20)
        watch.end()
    assert calls(watch)[-1]["process"]["name"] == "python3"
    assert calls(watch)[-1]["binding"]["match"] == "exact"


def test_a_network_card_that_is_plugged_in_is_watched_and_unplugged_is_forgotten(guest, network, tmp_path):
    port = network.add_port()
    with Watching(f"qemu:{guest.pid}", home=tmp_path) as watch:
        guest.qmp("netdev_add", type="tap", id="more", ifname=port.ifname, script="no", downscript="no")
        guest.qmp("device_add", driver="virtio-net-pci", id="card", netdev="more", mac=port.mac)
        wait_for(lambda: any(f"port {port.ifname} has come" in line for line in watch.said), 30)
        network.remove_port(port)
        guest.run(CALL)
        wait_for(lambda: calls(watch), 20)
        watch.end()
    assert not [line for line in watch.said if "ended" in line]
