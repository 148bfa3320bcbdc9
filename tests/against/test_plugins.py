"""Our plugins in stock `vol -p plugins`, unmodified and offline, on machines made of bytes; stock ones in our worker.

What stock netstat sees is compared in the same run: what it sees, ours see, and what it misses is said.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.evidence.volatility import SecondOpinion
from tests.against import stock
from tests.worlds.nouns import owner
from tests.worlds.windows import Machine
from tests.worlds.windows.real import real_symbols
from tests.worlds.windows.scene import Scene, plant
from tests.worlds.windows.xp import XpMachine

ROOT = Path(__file__).parents[2]
RAM = 32 << 20  # stock Volatility scans all of it
OURS = {"parasight", "netchains", "connections"}
SAME = ("Offset", "Proto", "LocalAddr", "LocalPort", "ForeignAddr", "ForeignPort", "State", "PID", "Owner", "Created")


@pytest.fixture(scope="module")
def symbols(tmp_path_factory) -> Path:
    """One folder for all machines: Volatility makes an index of its tables and of these, anew for each folder."""
    return tmp_path_factory.mktemp("symbols")


@pytest.fixture(scope="module")
def world(symbols):
    """A server with 1,000 connections in shared buckets, and all that is odd."""
    with Machine("20348", path=symbols / "memory.raw", partitions=4, ram=RAM) as machine:
        scene = plant(machine)
        for number in range(1000):
            remote = (f"203.0.113.{number % 250}", 1024 + number)
            machine.tcp(scene.browser, ("10.0.0.5", 10000 + number), remote, bucket=number % 100)
        machine.write_symbols(symbols)
        machine.write_elf(symbols / "memory.elf")
        yield scene, symbols


@pytest.fixture(scope="module")
def deep(symbols):
    """A server whose tables have a second level."""
    with Machine("19041", path=symbols / "deep.raw", table_size=300, partitions=1, ram=RAM) as machine:
        for number in range(350):
            machine.tcp(machine["lsass.exe"], ("10.0.0.5", 10000 + number), ("203.0.113.1", 443))
        machine.write_symbols(symbols)
        yield machine


XP = {"xp-sp3": (True, True), "2003-sp2": (False, False)}  # with PAE, with symbols of tcpip.sys


@pytest.fixture(scope="module")
def old(symbols):
    """What is true of XP and Server 2003, by their eras."""
    truth = {}
    for era, (pae, named) in XP.items():
        machine = XpMachine(era, pae=pae, ram=RAM, path=symbols / f"{era}.raw")
        for number in range(40):
            machine.tcp(machine.explorer, ("172.16.112.128", 1038 + number), ("41.168.5.140", 8080))
        machine.listener(machine.svchost, ("0.0.0.0", 135))
        machine.udp(machine.svchost, ("0.0.0.0", 137))
        machine.inject(machine.explorer)
        machine.write_symbols(symbols, tcpip=named)
        truth[era] = machine.truth(), machine.explorer, machine.svchost
        machine.close()
    return truth


@pytest.fixture(scope="module")
def vol(symbols, world, deep, old):
    """Stock Volatility as a person runs it."""

    return lambda location, *words, **options: stock.vol(location, symbols, *words, **options)


@pytest.fixture(scope="module")
def rows(world, vol):
    """What our netstat says of it, with a scan."""
    _, folder = world
    return vol(folder / "memory.raw", "windows.netchains", "--scan")


def seen(rows: list[dict], kind: str = "TCP") -> dict[tuple, str]:
    """Flags by connection."""
    return {
        (row["LocalAddr"], row["LocalPort"], row["ForeignAddr"], row["ForeignPort"], row["PID"]): row["Flags"]
        for row in rows
        if row["Proto"].startswith(kind) and row["State"] != "LISTENING"
    }


def key(endpoint) -> tuple:
    return (*endpoint.local, *endpoint.remote, endpoint.process.pid if endpoint.process else None)


@pytest.mark.parametrize("installed", [True, False])
def test_all_that_we_add_to_volatility_is_imported(installed):
    script = f"""
import sys
sys.path = [one for one in sys.path if {installed} or one != {str(ROOT)!r}]
import volatility3.plugins
from volatility3 import framework
volatility3.plugins.__path__ = [{str(ROOT / "plugins")!r}, *volatility3.plugins.__path__]
print(framework.import_files(volatility3.plugins, True))
print(sorted(name for name in framework.list_plugins() if any(ours in name for ours in {sorted(OURS)!r})))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd="/", capture_output=True, text=True, check=True)
    failed, listed = done.stdout.splitlines()
    assert not any(ours in failed for ours in OURS), failed
    assert listed == "['windows.connections.Connections', 'windows.netchains.NetChains']"


def test_every_connection_of_a_thousand_in_shared_buckets_is_listed(world, rows):
    scene, _ = world
    truth = {key(one) for one in scene.machine.truth().connections if one.kind == "TcpE"}
    assert len(truth) > 1000
    assert truth <= seen(rows).keys()


def test_what_stock_netstat_sees_is_seen_alike_and_it_sees_less_than_half(world, rows, vol):
    _, folder = world
    stock = vol(folder / "memory.raw", "windows.netstat", ours=False)
    assert 100 < len(stock) < len(rows) / 2
    ours = {tuple(row[name] for name in SAME) for row in rows}
    assert {tuple(row[name] for name in SAME) for row in stock} <= ours


def test_what_was_unlinked_is_flagged_and_nothing_else(world, rows):
    scene, _ = world
    expected = {
        key(scene.unlinked): "unlinked-endpoint",
        key(scene.first_only): "one-table-only",
        key(scene.second_only): "one-table-only",
        key(scene.waiting): "time-wait",
    }
    flagged = {row: flags for row, flags in seen(rows).items() if flags}
    assert {row: flags for row, flags in flagged.items() if row in expected} == expected
    living = {key(one) for one in scene.machine.truth().connections if one.kind == "TcpE"}
    assert not (flagged.keys() - expected.keys()) & living  # what was freed and not poisoned may be found by a scan


def test_tables_of_which_the_directory_has_a_second_level_are_read_whole(symbols, deep, vol):
    found = seen(vol(symbols / "deep.raw", "windows.netchains"))
    assert found == {key(one): "" for one in deep.truth().connections}


def test_the_owner_of_a_hidden_process_is_named(world, rows):
    scene, _ = world
    (row,) = [row for row in rows if row["LocalPort"] == scene.of_hidden.local[1]]
    assert (row["PID"], row["Owner"]) == (scene.hidden.pid, "hidden.exe")


def test_a_memory_of_ours_is_a_layer_of_stock_volatility(world, vol):
    _, folder = world
    plain = vol(folder / "memory.raw", "windows.pslist")
    assert len(plain) > 10
    assert vol(f"parasight:file:{folder / 'memory.raw'}", "windows.pslist") == plain


def test_a_core_with_holes_in_it_is_one_too(world, vol):
    _, folder = world
    assert len(vol(f"parasight:file:{folder / 'memory.elf'}", "windows.pslist")) > 10


def test_a_place_that_is_none_is_refused_with_a_reason(vol):
    with pytest.raises(AssertionError, match="parasight:nonsense:7"):
        vol("parasight:nonsense:7", "windows.pslist")


@pytest.mark.parametrize("era", XP)
def test_connections_of_xp_and_2003_are_listed_with_and_without_symbols_of_tcpip(symbols, old, vol, era):
    truth, _, _ = old[era]
    found = vol(f"parasight:file:{symbols / f'{era}.raw'}", "windows.connections")
    linked = [row for row in found if row["ForeignPort"]]
    assert sorted(
        ((row["LocalAddr"], row["LocalPort"]), (row["ForeignAddr"], row["ForeignPort"]), row["PID"]) for row in linked
    ) == [(tuple(local), tuple(remote), pid) for local, remote, pid in truth["connections"]]
    assert {row["Owner"] for row in linked} == {"explorer.exe"}
    bound = {(row["LocalPort"], row["PID"]) for row in found if not row["ForeignPort"]}
    assert bound == {(local[1], pid) for _, local, pid in truth["sockets"]}
    assert [row["LocalPort"] for row in found if row["State"] == "LISTENING"] == [135]


# -- the second opinion --


@pytest.fixture(scope="module")
def opinion(world, tmp_path_factory):
    _, folder = world
    made = SecondOpinion(f"file:{folder / 'memory.raw'}", symbols=[folder], cache=tmp_path_factory.mktemp("opinion"))
    yield made
    made.close()


def keeper(image: Path, symbols: Path, home: Path) -> SecondOpinion:
    return SecondOpinion(f"file:{image}", symbols=[symbols], cache=home / "cache")


def ask(opinion: SecondOpinion, process, pid: int | None = None):
    asked = owner(process.pid if pid is None else pid).process
    assert opinion.ask("windows", replace(asked, task_va=process.va))
    deadline_s = time.monotonic() + 60
    while not (heard := opinion.heard()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return heard[0]


def kinds(found) -> set[str]:
    return {one.kind.removeprefix("volatility:") for one in found.evidence}


def test_volatility_names_what_was_injected_into_one_process(world, opinion):
    scene, _ = world
    found = ask(opinion, scene.victim)
    assert found.trouble is None
    assert {"malfind", "ldrmodules", "suspicious_threads"} <= kinds(found)
    regions = {(one.address, one.size) for one in found.evidence if one.kind == "volatility:malfind"}
    assert (scene.injected.start, scene.injected.size) in regions
    assert any("evil.dll" in one.claim for one in found.evidence)
    threads = [one.address for one in found.evidence if one.kind == "volatility:suspicious_threads"]
    assert any(scene.injected.start <= address < scene.injected.start + scene.injected.size for address in threads)


def test_a_relative_folder_of_symbols_will_do(world, tmp_path, monkeypatch):
    scene, folder = world
    monkeypatch.chdir(folder)
    with contextlib.closing(keeper(folder / "memory.raw", Path(), tmp_path)) as one:
        assert ask(one, scene.victim).trouble is None


def test_volatility_names_a_hollowed_process_and_a_liar(world, opinion):
    scene, _ = world
    assert kinds(ask(opinion, scene.hollowed)) & {"hollowprocesses", "malfind"}
    assert "pebmasquerade" in kinds(ask(opinion, scene.liar))


def test_volatility_sees_nothing_in_an_honest_process(world, opinion):
    scene, _ = world
    assert kinds(ask(opinion, scene.browser)) == {"nothing"}


def test_a_process_that_hides_from_the_kernels_list_is_looked_at_all_the_same(world, opinion):
    scene, _ = world
    scene.machine.inject(scene.hidden)
    assert "malfind" in kinds(ask(opinion, scene.hidden))


def test_what_changes_in_a_running_guest_is_seen_by_the_next_question(world, opinion):
    scene, _ = world
    server = scene.machine["lsass.exe"]
    assert "malfind" not in kinds(ask(opinion, server))
    scene.machine.inject(server)
    assert "malfind" in kinds(ask(opinion, server))


def test_an_address_that_is_not_this_process_is_not_asked_about(world, opinion):
    scene, _ = world
    found = ask(opinion, scene.browser, pid=scene.victim.pid)
    assert found.evidence == ()
    assert found.trouble == "the process is gone"


@pytest.mark.parametrize("family", ["17763", "26100"])
def test_other_builds_get_a_second_opinion_too(tmp_path, family):
    with Machine(family, path=tmp_path / "memory.raw") as machine:
        scene: Scene = plant(machine)
        machine.write_symbols(tmp_path)
        with contextlib.closing(keeper(tmp_path / "memory.raw", tmp_path, tmp_path)) as one:
            assert "malfind" in kinds(ask(one, scene.victim))


@pytest.mark.parametrize("era", XP)
def test_so_do_xp_and_server_2003(symbols, old, tmp_path, era):
    _, injected, honest = old[era]
    with contextlib.closing(keeper(symbols / f"{era}.raw", symbols, tmp_path)) as one:
        assert {"malfind", "suspicious_threads"} <= kinds(ask(one, injected))
        assert kinds(ask(one, honest)) == {"nothing"}


@pytest.mark.parametrize("family", ["17763", "20348"])
def test_and_machines_with_the_symbols_of_real_builds(tmp_path, family):
    real = real_symbols()
    with Machine(family, path=tmp_path / "memory.raw", symbols=real) as machine:
        scene: Scene = plant(machine)
        with contextlib.closing(keeper(tmp_path / "memory.raw", real, tmp_path)) as one:
            assert {"malfind", "ldrmodules", "suspicious_threads"} <= kinds(ask(one, scene.victim))
            assert kinds(ask(one, scene.browser)) == {"nothing"}


def test_a_kernel_without_symbols_is_a_trouble_that_says_what_is_lacking(world, tmp_path):
    scene, folder = world
    with contextlib.closing(keeper(folder / "memory.raw", tmp_path, tmp_path)) as one:
        found = ask(one, scene.victim)
    assert found.evidence == ()
    assert "ntkrnlmp.pdb" in found.trouble


def test_a_machine_with_bytes_changed_at_random_gets_an_answer_each_time(tmp_path):
    """In the process's own structures and those around them, 1 to 1,000 bytes at a time."""
    chance = random.Random(4)
    with Machine("20348", path=tmp_path / "memory.raw") as machine:
        victim = plant(machine).victim
        machine.write_symbols(tmp_path)
        space, ram = machine.kernel.space, machine.kernel.ram
        near = [victim.va + offset for offset in (*range(0, 0xA00, 8), *range(-0x4000, 0x8000, 8))]
        with contextlib.closing(keeper(tmp_path / "memory.raw", tmp_path, tmp_path)) as one:
            sound = ask(one, victim)
            for _ in range(12):
                places = {
                    space.gpa(chance.choice(near)) + chance.randrange(8) for _ in range(10 ** chance.randrange(4))
                }
                before = {place: ram.read(place, 1) for place in places}
                for place in places:
                    ram.write(place, chance.randbytes(1))
                ask(one, victim)
                for place, byte in before.items():
                    ram.write(place, byte)
            assert ask(one, victim) == sound


# -- the worker itself --


@pytest.fixture
def worker(world, tmp_path):
    """Our worker, for questions that the appliance would not ask."""
    _, folder = world
    command = [sys.executable, "-P", "-m", "plugins.parasight.worker", f"file:{folder / 'memory.raw'}", str(tmp_path)]
    process = subprocess.Popen(
        [*command, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
    )

    def say(question: bytes) -> dict:
        process.stdin.write(question + b"\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    say.process = process
    yield say
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def test_a_question_that_is_none_is_answered_with_an_error(worker, world):
    for question in (b"{}", b"[]", b"nonsense", b'{"os": "linux", "pid": "x", "at": 7, "plugins": []}'):
        assert worker(question)["error"]
    scene, _ = world
    at = f"{scene.victim.va:#x}"
    plugins = ["os", "windows.pslist; import os", "windows.nosuch", "windows..pslist", "windows.pslist"]
    body = {"id": 7, "os": "windows", "pid": scene.victim.pid, "at": at, "plugins": plugins}
    answer = worker(json.dumps(body).encode())
    assert list(answer["rows"]) == ["windows.pslist"]
    assert [row["PID"] for row in answer["rows"]["windows.pslist"]] == [scene.victim.pid]
    assert answer["failed"].keys() == set(plugins[:-1])


def test_the_worker_is_held_down_by_the_kernel(worker):
    worker(b"{}")
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    data = next(line for line in limits.splitlines() if line.startswith("Max data size")).split()
    cpu = next(line for line in limits.splitlines() if line.startswith("Max cpu time")).split()
    assert int(data[3]) == int(data[4]) <= 3 << 30
    assert 0 < int(cpu[3]) < 120
    assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) > 0


def test_the_worker_ends_with_its_questions(worker):
    worker(b"{}")
    worker.process.stdin.close()
    assert worker.process.wait(timeout=20) == 0
