"""A guest that reboots, or is watched before its kernel runs, is seen again without anybody's help."""

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
