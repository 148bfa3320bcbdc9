"""Subjects and rule sets for the tests of the rules."""

from __future__ import annotations

import textwrap
from ipaddress import ip_address

from appliance.model import (
    Binding,
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowId,
    GuestId,
    GuestProcess,
    Match,
    Missing,
    Owner,
    ProcessKey,
    Reason,
    Transport,
)
from appliance.rules import RuleBook, Subject, load_text

HEAD = "apiVersion: v1\nkind: RuleSet\nmetadata: {name: site}\n"


def book(spec: str) -> RuleBook:
    return load_text(HEAD + "spec:\n" + textwrap.indent(textwrap.dedent(spec).strip("\n"), "  "), "site.yaml")


def process(
    path: str | Missing = "/usr/sbin/nginx",
    *,
    name: str = "nginx",
    pid: int = 100,
    parent_pid: int = 1,
    uid: int = 33,
    user: str | None = "www-data",
    command: str | Missing = "nginx: worker process",
    cgroup: str | Missing = "/system.slice/nginx.service",
    container: str | None = None,
    deleted: bool = False,
) -> GuestProcess:
    return GuestProcess(
        ProcessKey(pid, 1), name, path, command, parent_pid, uid, user, deleted, container=container, cgroup=cgroup
    )


def flow(
    remote: str = "10.77.0.1",
    port: int = 5001,
    *,
    inbound: bool = False,
    protocol: Transport = Transport.TCP,
    other_port: int = 40000,
    at_ns: int = 0,
    midstream: bool = False,
) -> Flow:
    far, near = (other_port, port) if inbound else (port, other_port)
    five = FiveTuple(protocol, Endpoint(ip_address("10.77.0.2"), near), Endpoint(ip_address(remote), far))
    direction = Direction.IN if inbound else Direction.OUT
    return Flow(FlowId(GuestId("qemu:1"), 1), five, direction, at_ns, midstream=midstream)


def subject(
    *owners: GuestProcess,
    flow: Flow,
    names: tuple[str, ...] = (),
    os: str = "linux",
    parent: GuestProcess | None = None,
    tags: tuple[str, ...] = (),
    reason: Reason | None = None,
    match: Match | None = None,
) -> Subject:
    held = tuple(Owner(owner, (3,)) for owner in owners)
    binding = Binding(match or (Match.EXACT if owners else Match.NONE), reason, held, 1000)
    return Subject(flow, binding, names, os, parent, tags)
