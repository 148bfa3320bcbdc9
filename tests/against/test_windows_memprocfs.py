"""MemProcFS, the second engine, takes the machine for Windows where it is made with real symbol tables.

It wants a kernel that it knows by its PDB. Its own limits: an owner is found on the list of processes only; of a bucket
it takes the first and the last entry; it goes by the second of the two tables; TIME_WAIT and unlinked endpoints it has
from a map of pool tags that our machine does not keep.
"""

import os
from pathlib import Path

import pytest

from tests.against import memprocfs_oracle
from tests.against.memprocfs_oracle import TCP_ENDPOINT, TCP_LISTENER, UDP_ENDPOINT
from tests.against.windows_oracle import ask
from tests.worlds.windows import Machine
from tests.worlds.windows.net import STATES, Endpoint
from tests.worlds.windows.scene import Scene, plant
from tests.worlds.windows.symbols import NT, REAL

TAGS = {"TcpE": TCP_ENDPOINT, "TcpL": TCP_LISTENER, "UdpA": UDP_ENDPOINT}


def symbol_folder(family: str) -> Path:
    """The folder with the real pair of a build; without it the test is skipped."""
    for folder in filter(None, os.environ.get("PARASIGHT_SYMBOLS", "").split(os.pathsep)):
        if (Path(folder) / "windows" / NT / f"{REAL[family][0]}-1.json.xz").exists():
            return Path(folder)
    # Microsoft's symbols are not ours to carry: compared where a folder of them lies beside the checkout.
    pytest.skip(f"PARASIGHT_SYMBOLS names no folder with the symbols of build {family}")


@pytest.fixture(scope="module", params=sorted(REAL))
def planted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"real-{request.param}")
    with Machine(request.param, path=folder / "memory.raw", symbols=symbol_folder(request.param)) as machine:
        yield plant(machine), folder


@pytest.fixture(scope="module")
def said(planted):
    return memprocfs_oracle.ask(planted[1] / "memory.raw")


def test_it_lists_every_process_that_is_on_the_list_with_its_path(planted, said):
    scene, _ = planted
    truth = {
        (each.pid, each.ppid, each.va, each.name)
        for each in scene.machine.truth().processes
        if each is not scene.hidden
    }
    told = {(row["pid"], row["ppid"], row["eprocess"], row["name"]) for row in said["processes"]}
    assert told == truth
    browser = next(row for row in said["processes"] if row["pid"] == scene.browser.pid)
    assert browser["path"] == scene.browser.modules[0].file.device
    assert browser["command"] == scene.browser.command


def test_it_agrees_on_every_usual_endpoint(planted, said):
    scene, _ = planted
    rows = {row["va"]: row for row in said["net"]}
    for endpoint in reachable(scene):
        row = rows[endpoint.va]
        assert row["tag"] == TAGS[endpoint.kind]
        assert row["pid"] == endpoint.process.pid
        assert tuple(row["local"]) == endpoint.local
        if endpoint.kind == "TcpE":
            assert (tuple(row["remote"]), row["state"]) == (endpoint.remote, STATES[endpoint.state])


def test_it_sees_nothing_but_what_is_there(planted, said):
    scene, _ = planted
    truth = {each.va for each in scene.machine.truth().connections}
    assert {row["va"] for row in said["net"]} <= truth
    missed = truth - {row["va"] for row in said["net"]}
    expected = {each.va for each in (scene.unlinked, scene.first_only, scene.waiting)}
    assert missed - {each.va for each in beyond(scene)} == expected | {scene.chained[1].va}


def test_it_tells_no_owner_where_the_process_is_hidden(planted, said):
    scene, _ = planted
    row = next(row for row in said["net"] if row["va"] == scene.of_hidden.va)
    assert row["pid"] == 0


def test_volatility_agrees_with_it_by_the_real_symbols(planted, said):
    scene, folder = planted
    scene.machine.write_symbols(folder)
    answers = ask(folder / "memory.raw", folder, ["pslist", "netscan"])
    assert {row["pid"] for row in said["processes"]} == {row["PID"] for row in answers["pslist"]}
    ours = {row["va"] & (1 << 48) - 1: row for row in said["net"] if row["tag"] == TCP_ENDPOINT}
    theirs = {row["Offset"]: row for row in answers["netscan"]}
    assert set(ours) <= set(theirs)
    for va, row in ours.items():
        other = theirs[va]
        assert tuple(row["local"]) == (other["LocalAddr"], other["LocalPort"])
        assert tuple(row["remote"]) == (other["ForeignAddr"], other["ForeignPort"])
        assert row["pid"] in (other["PID"], 0)


def beyond(scene: Scene) -> list[Endpoint]:
    """Sockets whose port ends beyond what it reads of a list of 256 of them: its first page only."""
    entries = 4096 // (0x20 if scene.machine.kernel.build >= 19041 else 0x18)
    sockets = (each for each in scene.machine.truth().connections if each.kind in ("TcpL", "UdpA"))
    return [each for each in sockets if each.local[1] & 0xFF >= entries]


def reachable(scene: Scene) -> list[Endpoint]:
    """Usual endpoints, and the ends of the chain."""
    return [each for each in scene.usual if each not in beyond(scene)] + [scene.chained[0], scene.chained[2]]
