"""The command `parasight connections` on a Windows machine, against what is true and against two other engines."""

import time

import pytest

from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.symbols import SymbolStore
from tests.against import memprocfs_oracle, windows_oracle
from tests.against.test_windows_memprocfs import symbol_folder
from tests.worlds.command import parasight
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.live import Busy
from tests.worlds.windows.net import Endpoint
from tests.worlds.windows.scene import Scene, plant
from tests.worlds.windows.symbols import REAL

CROWD = 1000
LOOKS = 40


def told(folder, what: str = "connections") -> list[dict]:
    """The rows of the command for the machine in a folder."""
    done = parasight(what, f"file:{folder / 'memory.raw'}", "--symbols", folder, "-o", "jsonl", home=folder)
    assert done.code == 0, done.err
    return done.objects


def row_of(row: dict) -> tuple:
    """A row of the command, to be compared."""
    far = (row["remote"]["ip"], row["remote"]["port"]) if row["remote"] else None
    owners = tuple((owner["pid"], owner["name"]) for owner in row["owners"])
    local = row["local"]["ip"], row["local"]["port"]
    return row["protocol"], row["state"], local, far, owners, tuple(row["flags"])


def truth_of(scene: Scene, endpoint: Endpoint) -> tuple:
    """What it should tell of an endpoint. Whom a UDP socket is connected to is known from build 19041 on."""
    flags = {
        scene.unlinked.va: ("unlinked-endpoint",),
        scene.first_only.va: ("one-table-only",),
        scene.second_only.va: ("one-table-only",),
        scene.of_hidden.va: ("hidden-process",),
        scene.of_ended.va: ("owner-exited",),
        scene.closed.va: ("stale",),
    }.get(endpoint.va, ())
    owners = ((endpoint.process.pid, endpoint.process.name),) if endpoint.process else ()
    known = endpoint.protocol == "tcp" or scene.machine.kernel.build >= 19041
    state, remote = (endpoint.state, endpoint.remote) if known else ("CLOSE", None)
    return endpoint.protocol, state, endpoint.local, remote, owners, flags


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_was_planted_is_told_with_its_owner_and_its_flag_and_nothing_else(tmp_path, family):
    with Machine(family, path=tmp_path / "memory.raw") as machine:
        scene = plant(machine)
        machine.write_symbols(tmp_path)
        truth = [truth_of(scene, each) for each in [*machine.truth().connections, scene.closed]]
        assert sorted(map(row_of, told(tmp_path)), key=repr) == sorted(truth, key=repr)
        processes = {(row["pid"], row["parent_pid"], row["name"]) for row in told(tmp_path, "processes")}
        assert processes == {(each.pid, each.ppid, each.name) for each in machine.truth().processes}


def test_of_a_thousand_connections_in_shared_buckets_it_tells_all_and_volatility_less_than_half(tmp_path):
    with Machine(path=tmp_path / "memory.raw") as machine:
        browser = machine.process("browser.exe", parent=machine["explorer.exe"])
        for number in range(CROWD):
            machine.tcp(browser, ("10.0.0.5", 20000 + number), (f"198.51.100.{number % 250}", 443))
        machine.write_symbols(tmp_path)
        rows = told(tmp_path)
        answers = windows_oracle.ask(tmp_path / "memory.raw", tmp_path, ["netstat"])
    assert len(rows) == CROWD
    assert {row["owners"][0]["pid"] for row in rows} == {browser.pid}
    theirs = {(row["LocalAddr"], row["LocalPort"]) for row in answers["netstat"]}
    assert theirs < {(row["local"]["ip"], row["local"]["port"]) for row in rows}
    assert len(theirs) < CROWD / 2


@pytest.mark.parametrize("family", sorted(REAL))
def test_both_engines_say_the_same_of_every_endpoint_that_they_know(tmp_path, family):
    with Machine(family, path=tmp_path / "memory.raw", symbols=symbol_folder(family)) as machine:
        scene = plant(machine)
        machine.write_symbols(tmp_path)
        ours = {int(row["address"], 16): row for row in told(tmp_path)}
        volatility = windows_oracle.ask(tmp_path / "memory.raw", tmp_path, ["netscan"])["netscan"]
        memprocfs = memprocfs_oracle.ask(tmp_path / "memory.raw")["net"]
    assert len(volatility) > 15
    assert len(memprocfs) > 10
    for row in volatility:
        other = ours[row["Offset"] | 0xFFFF << 48]
        assert row["PID"] == other["owners"][0]["pid"]
        assert row["LocalPort"] == other["local"]["port"]
        if row["ForeignPort"]:
            assert row["ForeignAddr"] == other["remote"]["ip"]
    for row in memprocfs:
        other = ours[row["va"]]
        owner = 0 if row["va"] == scene.of_hidden.va else other["owners"][0]["pid"]
        assert (row["pid"], row["local"]) == (owner, [other["local"]["ip"], other["local"]["port"]])


def test_while_connections_come_and_go_nobody_is_named_who_does_not_own_them(tmp_path):
    with Machine() as machine:
        programs = [machine.process(f"program-{number}.exe", parent=machine["explorer.exe"]) for number in range(5)]
        kernel = attach(machine.memory(), symbols=SymbolStore([machine.write_symbols(tmp_path)]))
        eye = WindowsEye(kernel, time.time_ns, time.monotonic)
        with Busy(machine, programs) as busy:
            looks = [eye.read_snapshot() for _ in range(LOOKS)]
        assert busy.steps > LOOKS
    for look in looks:
        assert len(look.sockets) + look.torn > busy.alive / 2
        for socket in look.sockets:
            assert [owner.process.pid for owner in socket.owners] == [busy.owner_of(socket.local.port).pid]
