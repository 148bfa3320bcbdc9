"""Who gives orders to a watch, and when it is ready; real ports, the command as a person runs it."""

import contextlib
import errno
import json
import resource
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from appliance import daemon
from appliance.assembly import Options
from appliance.cli import contract
from appliance.errors import HostError
from appliance.hosts.inventory import Inventory
from appliance.model import Decision, Decoy, GuestId, GuestInfo, GuestPort
from appliance.respond.room import Words
from appliance.rules import load_text
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.netns import call_in_netns
from appliance.watch import ENDED
from tests.rules.builders import HEAD
from tests.tap.bpf.both import wait_for
from tests.tap.world import HOST_IP, PORT, ip, make_world
from tests.test_roster import Source
from tests.worlds.command import Watching, parasight

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

RULES = HEAD + "spec:\n  mode: enforce\n  unbound: {action: deny}\n"
NOBODY = 300  # bans: more than are told to a guest in one go


@pytest.fixture(scope="module")
def world():
    with make_world("dm") as made:
        yield made


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


@contextlib.contextmanager
def watching(targets, ready, report=contract.verdict_id, rules=RULES, inventory=None, **options):
    """A watch in this process."""
    stop, said, summaries = threading.Event(), [], []

    def run():
        summaries[:] = daemon.watch(
            targets,
            load_text(rules),
            report,
            stop=stop,
            ready=ready,
            idle=lambda: None,
            tell=said.append,
            words=Words(contract.verdict, contract.iso),
            options=Options(**options),
            inventory=inventory,
        )

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield summaries, said
    finally:
        stop.set()
        thread.join()


def count_filters(world):
    """Ours, on what the guest sends."""
    words = ["tc", "-n", world.host, "filter", "show", "dev", PORT, "ingress"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout.count("parasight_tap")


def test_rules_act_only_where_orders_are_taken_and_a_second_watch_may_look(world, rules, tmp_path):
    target = f"port:{PORT}@{world.host}"
    with Watching(target, "--rules", rules, "--enforce", home=tmp_path):
        second = parasight("watch", target, "--rules", rules, "--enforce", "--for", "1s", home=tmp_path)
        assert second.code == 6
        assert "already running" in second.err
        assert "PARASIGHT_RUN_DIR" in second.err
        assert count_filters(world) == 1
        looking = parasight("watch", target, "--rules", rules, "--for", "1s", home=tmp_path)
        assert looking.code == 0, looking.err
        assert "takes no orders" in looking.err


def test_one_is_ready_when_what_is_new_waits(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    holds, ready, hold_new = threading.Event(), threading.Event(), KernelTap.hold_new

    def hold_slowly(tap, policy):
        time.sleep(0.5)
        hold_new(tap, policy)
        holds.set()

    monkeypatch.setattr(KernelTap, "hold_new", hold_slowly)

    def is_ready():
        assert holds.is_set()
        ready.set()

    with watching([f"port:{PORT}@{world.host}"], is_ready, enforce=True) as (_, said):
        assert ready.wait(60), said


def test_a_guest_that_is_named_twice_is_watched_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    ready = threading.Event()
    with watching([f"port:{PORT}@{world.host}", f"port:{PORT}@{world.host_path}"], ready.set) as (summaries, said):
        assert ready.wait(60), said
        assert count_filters(world) == 1
    assert len(summaries) == 1


def test_all_bans_are_in_force_also_where_no_orders_are_taken(world, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "file" / "run"))
    book, ready = tmp_path / "bans.json", threading.Event()
    peers = [f"10.79.{number // 250}.{number % 250 + 1}" for number in range(NOBODY)]
    ban = {"guest": None, "target": None, "since_ns": 0, "until_ns": None, "reason": "", "who": "root"}
    book.write_text(json.dumps({"version": 1, "bans": [ban | {"peer": peer} for peer in peers]}))
    ip("-n", world.host, "route", "add", "local", "10.79.0.0/16", "dev", "lo")
    ip("-n", world.guest, "route", "add", "10.79.0.0/16", "via", HOST_IP)
    server, caller = (
        call_in_netns(path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for path in (world.host_path, world.guest_path)
    )
    server.bind(("0.0.0.0", 9999))
    server.settimeout(30)

    def count_heard():
        for peer in [*peers, HOST_IP]:  # the last is not banned
            caller.sendto(peer.encode(), (peer, 9999))
        return sum(1 for _ in iter(lambda: server.recv(64), HOST_IP.encode()))

    with server, caller, watching([f"port:{PORT}@{world.host}"], ready.set, bans=book) as (_, said):
        assert ready.wait(60), said
        assert any("takes no orders" in line for line in said)
        wait_for(lambda: count_heard() == 0)


def test_a_verdict_that_cannot_be_shown_costs_itself_and_not_the_watch(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    ready, seen = threading.Event(), []

    def show(verdict):
        seen.append(verdict)
        if len(seen) == 1:
            raise UnicodeEncodeError("ascii", "\xe9", 0, 1, "a letter that this terminal has not")
        return contract.verdict_id(verdict)

    with (
        watching([f"port:{PORT}@{world.host}"], ready.set, show) as (summaries, said),
        call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as caller,
    ):
        assert ready.wait(60), said
        for port in (4001, 4002):
            caller.sendto(b"x", (HOST_IP, port))
        wait_for(lambda: len(seen) >= 2)
    assert (summaries[0].defect, summaries[0].unshown) == (True, 1)
    assert len([line for line in said if "report it" in line]) == 1


def test_a_decoy_that_the_rules_want_and_nobody_named_is_told_at_the_start(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    rules = HEAD + "spec:\n  mode: enforce\n  unbound: {action: deny, on_deny: [alert, redirect:trap, redirect:pit]}\n"
    ready, trap = threading.Event(), Decoy("trap", GuestPort("decoy0"), "02:00:00:00:00:09")
    with watching([f"port:{PORT}@{world.host}"], ready.set, rules=rules, enforce=True, decoys=(trap,)) as (_, said):
        assert ready.wait(60), said
    assert [line.partition(": ")[2] for line in said if "decoy" in line] == [
        "there is no decoy 'pit', what is redirected to it is blocked; say where it is with --decoy pit=IFNAME,MAC"
    ]


# -- a host that is followed --


def here(world, life=1, **more):
    """The world's guest, as a hypervisor would list it."""
    uuid = "11111111-2222-3333-4444-555555555555"
    ports = (GuestPort(PORT, None, world.host_path),)
    return GuestInfo(GuestId(uuid, uuid, "web-01", f"{uuid}-{life}"), ports=ports, **more)


def call_out(world, port):
    """The guest sends one datagram."""
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as caller:
        caller.sendto(b"x", (HOST_IP, port))


def test_guests_that_come_while_a_host_is_watched_are_watched_and_let_go(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    source, ready, seen = Source(), threading.Event(), []

    def report(verdict):
        seen.append(verdict)
        return contract.verdict_id(verdict)

    with watching([], ready.set, report, inventory=Inventory([source])) as (summaries, said):
        assert ready.wait(60), said
        assert "no guest to watch runs here yet" in said[0]
        for life in (1, 2):
            source.guests = [here(world, life)]
            wait_for(lambda life=life: len([line for line in said if "under watch (web-01)" in line]) == life)
            wait_for(lambda: count_filters(world) == 1)
            wait_for(lambda life=life: call_out(world, 5000 + life) or any(is_to(one, 5000 + life) for one in seen))
            source.guests = []
            wait_for(lambda: count_filters(world) == 0)
    instances = {one.flow.id.vm.instance for one in seen}
    assert instances == {here(world, 1).id.instance, here(world, 2).id.instance}
    assert [(one.vm, one.ended, one.tap.flows > 0) for one in summaries] == [(here(world).id.target, ENDED, True)] * 2
    assert not [line for line in said if "defect" in line]


def is_to(verdict, port):
    return verdict.flow.tuple.remote.port == port


def test_a_guest_named_by_its_name_is_waited_for_when_somebody_will_start_it_again(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    source, ready = Source(), threading.Event()
    source.guests = [here(world, manager="libvirt"), replace(here(world), id=GuestId("other", instance="other"))]
    with watching(["web-01"], ready.set, inventory=Inventory([source])) as (summaries, said):
        assert ready.wait(60), said
        assert count_filters(world) == 1
        source.guests = source.guests[1:]
        wait_for(lambda: count_filters(world) == 0)
        source.guests = [here(world, 2, manager="libvirt"), *source.guests]
        wait_for(lambda: count_filters(world) == 1)
    assert [one.awaited for one in summaries] == [True, True]


def test_where_a_found_guest_cannot_be_held_to_its_rules_it_is_said_and_watched(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    source, ready = Source(), threading.Event()
    source.guests = [here(world)]
    with watching([], ready.set, inventory=Inventory([source]), enforce=True, rung="packets") as (summaries, said):
        assert ready.wait(60), said
    assert any("cannot be held to its rules" in line for line in said)
    assert len(summaries) == 1
    with pytest.raises(HostError, match="cannot be held to its rules"):
        daemon.watch(
            ["web-01"],
            load_text(RULES),
            contract.verdict_id,
            stop=threading.Event(),
            ready=ready.set,
            idle=lambda: None,
            tell=said.append,
            words=Words(contract.verdict, contract.iso),
            options=Options(enforce=True, rung="packets"),
            inventory=Inventory([source]),
        )


def test_the_rules_for_a_tag_hold_for_the_guests_that_bear_it_from_when_they_do(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    rules = HEAD + "spec:\n  applies_to: {tags: [web]}\n  unbound: {action: deny}\n"
    source, ready, seen = Source(), threading.Event(), {}
    source.guests = [here(world)]

    def report(verdict):
        seen[verdict.flow.tuple.remote.port] = verdict.judgement.decision
        return contract.verdict_id(verdict)

    def call_until_seen(port):
        wait_for(lambda: call_out(world, port) or port in seen)
        return seen[port]

    with watching([], ready.set, report, rules, inventory=Inventory([source])) as (_, said):
        assert ready.wait(60), said
        assert call_until_seen(6001) is Decision.ALLOW
        source.guests = [here(world, tags=("db", "web"))]
        ports = iter(range(6002, 7000))
        wait_for(lambda: call_until_seen(next(ports)) is Decision.DENY)


def test_as_many_files_may_be_open_as_the_host_allows(tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
    ready = threading.Event()
    try:
        with watching([], ready.set, inventory=Inventory([Source()])) as (_, said):
            assert ready.wait(60), said
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_verdict_that_finds_no_room_on_the_disk_ends_no_watch(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path))
    ready, tries = threading.Event(), []

    def report(verdict):
        tries.append(verdict)
        raise OSError(errno.ENOSPC, "No space left on device")

    with watching([f"port:{PORT}@{world.host}"], ready.set, report=report) as (summaries, said):
        assert ready.wait(60), said
        ports = iter(range(7001, 9000))
        wait_for(lambda: call_out(world, next(ports)) or len(tries) >= 2)
    assert len([line for line in said if "No space left" in line]) == 1
    assert summaries[0].unshown == len(tries)
    assert not summaries[0].defect
