"""A host that is watched as it is: real QEMUs that come, are killed, come back as another life, come all at once."""

import os
import time
from pathlib import Path

import pytest

from appliance.respond.client import ask
from tests.respond.desks import eventually
from tests.worlds.command import Watching
from tests.worlds.hosted import SYN, Hosted

pytestmark = pytest.mark.system

MANY = 20
UUID = "7a0c8a52-2f0c-4f6e-9a53-0d5d1d4c9e01"
SERVER = "203.0.113.9"
RULES = """
apiVersion: v1
kind: RuleSet
metadata: {name: everyone, version: 2026.11.1}
spec:
  unbound: {action: allow}
"""


@pytest.fixture(scope="module")
def ram(tmp_path_factory) -> Path:
    """Nothing: these machines are never run."""
    path = tmp_path_factory.mktemp("ram") / "ram"
    path.touch()
    os.truncate(path, 32 << 20)
    return path


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "rules.yaml").write_text(RULES)
    with Watching("--rules", home / "rules.yaml", home=home) as watching:
        watching.home = home
        yield watching
        assert watching.end() == 0
        assert not [line for line in watching.said if "defect" in line], watching.said


def about(watch, machine, text):
    """What was said of this machine; other people's may run on this host too."""
    return [line for line in watch.said if line.startswith(f"qemu:{machine.pid}: ") and text in line]


def statuses(watch):
    return {one["vm"]: one for one in ask({"do": "status"}, watch.home / "run" / "control.sock")["guests"]}


def flows(watch, port):
    return [one for one in watch.verdicts if port in {one["flow"]["local"]["port"], one["flow"]["remote"]["port"]}]


def test_a_machine_that_is_started_killed_and_started_again_is_watched_in_each_of_its_lives(network, ram, watch):
    lives = []
    for life in (1, 2):
        with Hosted(network, ram, name="web-01", uuid=UUID, shared=False) as machine:
            lives.append(machine.pid)
            eventually(lambda machine=machine: about(watch, machine, f"under watch (web-01): {machine.port.ifname}"))
            machine.tcp((machine.port.ip4, 40000 + life), (SERVER, 443), SYN)
            eventually(
                lambda life=life: [one for one in watch.verdicts if one["flow"]["local"]["port"] == 40000 + life]
            )
            assert statuses(watch)[f"qemu:{machine.pid}"]["uuid"] == UUID
        eventually(lambda machine=machine: about(watch, machine, "the watch has ended: the guest has ended"))
        eventually(lambda machine=machine: f"qemu:{machine.pid}" not in statuses(watch))
    assert [one["vm"] for one in flows(watch, 40001) + flows(watch, 40002)] == [f"qemu:{pid}" for pid in lives]


def test_twenty_machines_that_start_at_once_are_all_watched_and_all_let_go(network, ram, watch, capsys):
    machines: list[Hosted] = []
    try:
        start_s = time.monotonic()
        machines += [Hosted(network, ram, name=f"m{number}", shared=False) for number in range(MANY)]
        eventually(lambda: all(about(watch, machine, "under watch") for machine in machines))
        with capsys.disabled():
            print(f"\n{MANY} machines started and watched in {time.monotonic() - start_s:.1f} s")
        for machine in machines:
            machine.udp((machine.port.ip4, 5353), (SERVER, 5353))
        seen = {f"qemu:{machine.pid}" for machine in machines}
        eventually(lambda: seen <= {one["vm"] for one in flows(watch, 5353)})
        assert seen <= {vm for vm, one in statuses(watch).items() if one["answers"]}
    finally:
        for machine in machines:
            machine.close()
    eventually(lambda: all(about(watch, machine, "the watch has ended") for machine in machines))
    eventually(lambda: not seen & statuses(watch).keys())
