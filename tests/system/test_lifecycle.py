"""A guest that reboots or gets another network card goes on being seen without anybody's help."""

import time

import pytest

from tests.worlds.command import Watching

pytestmark = pytest.mark.system

CALL = "/usr/bin/python3 -c 'import socket; socket.create_connection((\"10.77.0.1\", 7000)).close()'"


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def calls(watch):
    return [body for body in watch.verdicts if body["flow"]["remote"]["port"] == 7000]


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
