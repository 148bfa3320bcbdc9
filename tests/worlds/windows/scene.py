"""A machine in which everything happens that an eye must tell apart: what is usual, and what should not be."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.worlds.windows.machine import ALICE, Machine
from tests.worlds.windows.memory import Region
from tests.worlds.windows.net import Endpoint
from tests.worlds.windows.planted import Module, Process

HOME, HOME6 = "10.0.0.5", "fe80::5"


@dataclass
class Scene:
    """Who is who in `plant`'s machine."""

    machine: Machine
    server: Process
    browser: Process
    hidden: Process
    ended: Process
    victim: Process
    hollowed: Process
    liar: Process
    injected: Region
    foreign: Module
    hooked: Module
    usual: list[Endpoint] = field(default_factory=list)
    chained: list[Endpoint] = field(default_factory=list)  # three in one bucket, the last one is first in it
    unlinked: Endpoint | None = None
    first_only: Endpoint | None = None
    second_only: Endpoint | None = None
    of_hidden: Endpoint | None = None
    of_ended: Endpoint | None = None
    closed: Endpoint | None = None  # its block is freed and not poisoned
    waiting: Endpoint | None = None


def plant(machine: Machine) -> Scene:
    """Plant one of each."""
    server, explorer = machine["svchost.exe"], machine["explorer.exe"]
    folder = "C:\\Program Files\\Browser\\"
    browser = machine.process(
        "browser.exe",
        parent=explorer,
        path=folder + "browser.exe",
        command=f'"{folder}browser.exe" --profile',
        sid=ALICE,
        session=1,
    )
    evil = "C:\\Users\\Public\\hidden.exe"
    hidden = machine.process("hidden.exe", parent=explorer, path=evil, sid=ALICE, session=1, hidden=True)
    ended = machine.process("updater.exe", parent=explorer, path=folder + "updater.exe", sid=ALICE, session=1)
    victim = machine.process("notepad.exe", parent=explorer, sid=ALICE, session=1)
    hollowed = machine.process("calc.exe", parent=explorer, sid=ALICE, session=1)
    liar = machine.process("liar.exe", parent=explorer, path="C:\\Users\\Public\\liar.exe", sid=ALICE, session=1)
    module = machine.module(victim, "C:\\Windows\\System32\\ws2_32.dll", changed=True)
    scene = Scene(
        machine,
        server,
        browser,
        hidden,
        ended,
        victim,
        hollowed,
        liar,
        machine.inject(victim),
        machine.foreign_dll(victim),
        module,
    )
    machine.hollow(hollowed)
    machine.masquerade(liar, "C:\\Windows\\System32\\svchost.exe")
    _connect(scene)
    machine.exit(ended)
    machine.tick()
    return scene


def _connect(scene: Scene) -> None:
    machine, server, browser = scene.machine, scene.server, scene.browser
    scene.usual = [
        machine.listener(server, ("0.0.0.0", 80)),
        machine.listener(server, ("::", 80)),
        machine.listener(server, (HOME, 8081)),
        machine.udp(server, ("0.0.0.0", 123)),
        machine.udp(server, (HOME, 5353)),
        machine.udp(browser, ("::", 5355)),
        machine.udp(browser, (HOME, 51000), ("198.51.100.7", 443)),
        machine.tcp(browser, (HOME, 49701), ("93.184.216.34", 443), partition=0, bucket=3),
        machine.tcp(browser, (HOME6, 49702), ("2001:db8::5", 443), "CLOSE_WAIT", partition=1, bucket=3),
        machine.tcp(browser, (HOME, 49703), ("198.51.100.9", 443), "SYN_SENT", partition=2, bucket=3),
        machine.tcp(server, (HOME, 80), ("192.0.2.8", 50111), partition=3, bucket=3),
    ]
    scene.chained = [
        machine.tcp(browser, (HOME, 49710 + number), ("198.51.100.20", 443), partition=0, bucket=9)
        for number in range(3)
    ]
    odd = {"unlinked": (), "first_only": (1,), "second_only": (2,)}
    for number, (name, tables) in enumerate(odd.items()):
        peer = ("203.0.113.99", 1337 + number)
        endpoint = machine.tcp(
            scene.victim, (HOME, 49720 + number), peer, tables=tables, partition=1, bucket=20 + number
        )
        setattr(scene, name, endpoint)
    scene.of_hidden = machine.tcp(scene.hidden, (HOME, 49730), ("203.0.113.98", 4444), partition=2, bucket=30)
    scene.of_ended = machine.tcp(scene.ended, (HOME, 49731), ("203.0.113.97", 443), "FIN_WAIT2", partition=2, bucket=31)
    scene.waiting = machine.time_wait((HOME, 49740), ("198.51.100.9", 443))
    scene.closed = machine.tcp(browser, (HOME, 49741), ("198.51.100.30", 443), partition=3, bucket=40)
    machine.tcp_close(scene.closed, poison=False, reuse=False)
