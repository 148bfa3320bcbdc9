"""The JSON contract: nouns to plain objects. Documented in docs/json.md; changing a key here is a breaking change.

Absent values are null. Addresses in the guest are hexadecimal strings, times ISO 8601 in UTC, durations carry their
unit in the key.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from appliance.model import (
    Binding,
    Endpoint,
    Evidence,
    Flow,
    GuestInfo,
    GuestProcess,
    GuestSocket,
    Handling,
    Missing,
    Verdict,
    ip_text,
)
from appliance.summary import Summary

Json = dict[str, Any]


def iso(at_ns: int) -> str:
    """Format nanoseconds since the epoch as ISO 8601 in UTC, with microseconds."""
    seconds, rest = divmod(at_ns, 1_000_000_000)
    try:
        moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
    except (OverflowError, ValueError, OSError):
        return "0001-01-01T00:00:00Z"  # a guest can claim any time
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def text(value: str | Missing | None) -> str | None:
    """Turn an absent text into null."""
    return None if isinstance(value, Missing) else value


def endpoint(end: Endpoint | None) -> Json | None:
    """``{ip, port}``."""
    return None if end is None else {"ip": ip_text(end.ip), "port": end.port}


def process(one: GuestProcess | None) -> Json | None:
    """Describe one owner: the object of ``processes`` and of ``owners[]``."""
    if one is None:
        return None
    return {
        "pid": one.pid,
        "name": one.name,
        "path": text(one.path),
        "command": text(one.command),
        "uid": one.uid,
        "user": one.user,
        "parent_pid": one.parent_pid,
        "started": iso(one.started_wall_ns) if one.started_wall_ns is not None else None,
        "container": one.container,
        "sid": one.sid,
        "session": one.session,
        "services": list(one.services),
        "signer": one.signer,
        "flags": [flag.value for flag in one.flags],
    }


def connection(vm: str, socket: GuestSocket) -> Json:
    """One object of ``connections``."""
    return {
        "vm": vm,
        "protocol": socket.protocol.value,
        "state": socket.state,
        "local": endpoint(socket.local),
        "remote": endpoint(socket.remote),
        "owners": [process(owner.process) for owner in socket.owners],
        "netns": socket.netns,
        "address": f"{socket.address:#x}",
        "flags": [flag.value for flag in socket.flags],
    }


def flow(one: Flow) -> Json:
    """The ``flow`` of a verdict."""
    return {
        "protocol": one.tuple.protocol.value,
        "direction": one.direction.value,
        "local": endpoint(one.tuple.local),
        "remote": endpoint(one.tuple.remote),
        "vlan": one.vlan,
        "started": iso(one.started_ns),
        "midstream": one.midstream,
        "community_id": one.community_id,
    }


def binding(one: Binding) -> Json:
    """The ``binding`` of a verdict."""
    return {
        "match": one.match.value,
        "reason": one.reason.value if one.reason else None,
        "latency_us": round(one.latency_ns / 1000, 1),
    }


def evidence(one: Evidence) -> Json:
    """One claim about guest memory."""
    return {
        "kind": one.kind,
        "claim": one.claim,
        "address": f"{one.address:#x}",
        "size": one.size,
        "sha256": one.sha256,
        "detail": one.detail,
        "weight": one.weight,
    }


def verdict_id(one: Verdict) -> str:
    """Twelve hex digits that name a verdict; the same flow of a replay has the same id."""
    facts = (one.flow.id.vm.target, one.flow.id.vm.instance, one.flow.id.number, one.flow.tuple, one.flow.started_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def verdict(one: Verdict) -> Json:
    """One object of ``watch`` and ``replay``."""
    judged = one.judgement
    return {
        "id": verdict_id(one),
        "time": iso(one.at_ns),
        "vm": one.flow.id.vm.target,
        "vm_uuid": one.flow.id.vm.uuid,
        "vm_name": one.flow.id.vm.name,
        "flow": flow(one.flow) | {"names": list(one.names)},
        "binding": binding(one.binding),
        "process": process(one.binding.process),
        "owners": [process(owner.process) for owner in one.binding.owners],
        "verdict": judged.decision.value,
        "alert": judged.alert,
        "severity": judged.severity.value,
        "tags": list(judged.tags),
        "because": judged.because,
        "parasitic": one.parasitic,
        "rule": {
            "file": judged.rule.file,
            "line": judged.rule.line,
            "profile": judged.rule.profile,
            "ruleset": judged.rule.ruleset,
            "version": judged.rule.version,
        },
        "rules_version": one.rules_version,
        "evidence": [evidence(item) for item in one.evidence],
        **handling(one.handling),
    }


def handling(one: Handling | None) -> Json:
    """What the hand did, as keys of a verdict."""
    if one is None:
        return {"act": None, "act_done": None, "held_us": None}
    held_us = None if one.held_ns is None else round(one.held_ns / 1000, 1)
    return {"act": one.act.value, "act_done": one.done, "held_us": held_us}


def summary(watched: Sequence[Summary], cpu_s: float) -> Json:
    """Close a watch: totals over its guests, then each guest. Every loss is a figure."""
    guests = [_guest_summary(one) for one in watched]
    totals: Json = {"summary": True}
    for key in ("packets", "bytes", "flows", "events", "lost", "evicted", "torn", "gaps", "unshown", "acts_failed"):
        totals[key] = sum(one[key] for one in guests)
    for key in ("bound", "unbound", "verdicts", "ignored", "guest_errors", "opinions", "acts"):
        counted: Counter[str] = Counter()
        for one in guests:
            counted.update(one[key])
        totals[key] = dict(sorted(counted.items()))
    return totals | {"cpu_seconds": round(cpu_s, 3), "guests": guests}


def _guest_summary(one: Summary) -> Json:
    tap = one.tap
    return {
        "vm": one.vm,
        "vm_uuid": one.uuid,
        "vm_name": one.name,
        "packets": tap.packets,
        "bytes": tap.bytes,
        "flows": tap.flows,
        "events": tap.events,
        "lost": tap.lost,
        "evicted": tap.evicted,
        "ignored": dict(tap.ignored),
        "bound": dict(one.bound),
        "unbound": dict(one.unbound),
        "verdicts": dict(one.verdicts),
        "torn": one.torn,
        "gaps": one.gaps,
        "guest_errors": dict(one.guest_errors),
        "opinions": dict(one.opinions),
        "unshown": one.unshown,
        "acts": dict(one.acts),
        "acts_failed": one.acts_failed,
        "cpu_seconds": round(one.cpu_s, 3),
        "ended": one.ended or None,
        "lives": one.lives,
    }


def guest(one: GuestInfo) -> Json:
    """One object of ``guests``."""
    return {
        "vm": one.id.target,
        "name": one.id.name,
        "uuid": one.id.uuid,
        "pid": one.pid,
        "memory_bytes": one.memory_bytes,
        "ports": [{"ifname": port.ifname, "mac": port.mac, "netns": port.netns} for port in one.ports],
        "routes": list(one.routes),
        "notes": list(one.notes),
        "hypervisor": one.hypervisor,
        "domid": one.domid,
        "state": one.state.value,
        "tags": list(one.tags),
        "watch": one.wanted,
    }
