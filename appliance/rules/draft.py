"""Writes what was learnt as a rule file: a draft for a person to review, with counts as comments and its own tests.

A draft says ``status: draft``; ``watch`` refuses it until a person has written ``reviewed`` there.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator

from appliance.rules.learn import Allowed, Behaviour, Kind, Learnt, Seen, allowed_peers, base_name
from appliance.rules.values import RESERVED

_NAMESPACE = uuid.UUID("6f0f8f0e-2f9b-4c55-9d0c-0b9b4a3a5c11")  # so that the same program keeps its id
_COMMENT = 110
STRANGER = "203.0.113.66"  # RFC 5737: an address that nobody has
_PLAIN = re.compile(r"[^\x20-\x7e]")


def write_draft(learnt: Learnt, name: str = "learnt") -> str:
    """The text of the rule file: YAML, loadable as it is. Raises nothing; with nothing to suggest it says so."""
    lines = [
        *_head(learnt),
        "apiVersion: v1",
        "kind: RuleSet",
        f'metadata: {{name: {name}, version: "0", status: draft}}',
    ]
    lines += ["spec:", "  mode: monitor"]
    systems = {"windows" if "\\" in one.program.image else "linux" for one in learnt.suggested}
    if len(systems) == 1:
        lines.append(f"  applies_to: {{os: {systems.pop()}}}")
    names = _profile_names(learnt.suggested)
    if learnt.suggested:
        lines.append("  processes:")
    for one in learnt.suggested:
        lines += [f"    {line}".rstrip() for line in _profile(one, names[id(one)])]
    if learnt.suggested:
        lines.append("tests:")
    for one in learnt.suggested:
        lines += [f"  {line}" for line in _tests(one, names[id(one)])]
    return "\n".join(lines) + "\n"


def _head(learnt: Learnt) -> Iterator[str]:
    yield "# A draft, learnt from recorded behaviour. Read every entry: what was seen is not always what should be."
    yield "# When you agree, write `status: reviewed` below: `parasight watch` refuses a draft."
    yield f"# Learnt from {learnt.used} connections."
    for why, count in learnt.unused.items():
        yield f"#   not used, {why}: {count}"
    if learnt.others:
        yield "# Not suggested:"
    for one, why in learnt.others:
        yield _comment(f"  {_title(one)}: {why}")
    yield ""


def _profile(one: Behaviour, name: str) -> Iterator[str]:
    yield ""
    yield _comment(
        f"{one.connections} connections of {len(one.processes)} processes in {len(one.guests)} guests, "
        f"{one.first[:16]} to {one.last[:16]}"
    )
    if one.flagged:
        yield _comment(f"ATTENTION: {one.flagged} more were flagged when they were seen, and are not allowed here")
    yield f"- name: {name}"
    yield f"  id: {uuid.uuid5(_NAMESPACE, '/'.join(part or '' for part in one.program))}"
    service = f", service: {json.dumps(one.program.service)}" if one.program.service else ""
    yield f"  match: {{image: {json.dumps(one.program.image)}{service}}}"
    yield "  default: deny"
    yield "  allow:"
    for kind, seen in _sorted(one):
        peers = allowed_peers(kind, seen)
        yield "    " + _comment(_counts(kind, seen, peers, one))
        yield f"    - {{{_entry(kind, peers)}}}"
    yield "  severity: high"
    yield "  tags: [attack.t1055]"


def _sorted(one: Behaviour) -> list[tuple[Kind, Seen]]:
    return sorted(one.kinds.items(), key=lambda item: (-item[1].connections, item[0]))


def _counts(kind: Kind, seen: Seen, peers: Allowed, one: Behaviour) -> str:
    share = f"{100 * seen.connections / one.connections:.0f} %"
    text = f"{seen.connections} ({share}), {len(seen.peers)} peers, {len(seen.guests)} of {len(one.guests)} guests"
    if seen.names and not peers.domains:
        text += f"; most often {seen.names.most_common(1)[0][0]}"
    if not peers.ips and not peers.domains:
        text += "; too many peers to list: narrow it if you can"
    return text


def _entry(kind: Kind, peers: Allowed) -> str:
    parts = [f"direction: {kind.direction}", f"protocol: {kind.protocol}"]
    if kind.ports is not None:
        first, last = kind.ports
        parts.append(f"ports: {first}" if first == last else f"ports: {first}-{last}")
    if peers.ips or peers.domains:
        side = "to" if kind.direction == "out" else "from"
        what, values = ("ips", peers.ips) if peers.ips else ("domains", peers.domains)
        parts.append(f"{side}: {{{what}: {json.dumps(list(values))}}}")
    return ", ".join(parts)


def _tests(one: Behaviour, name: str) -> Iterator[str]:
    """One connection of each kind that was seen, and one that was not."""
    process = f"process: {{image: {json.dumps(one.program.image)}"
    process += f", service: {json.dumps(one.program.service)}}}" if one.program.service else "}"
    for number, (kind, seen) in enumerate(_sorted(one), 1):
        peer = seen.peers.most_common(1)[0][0]
        parts = [f"direction: {kind.direction}", f"protocol: {kind.protocol}", f'remote: "{peer}"']
        if kind.ports is not None:
            parts.append(f"port: {kind.ports[0]}")
        if (domains := allowed_peers(kind, seen).domains) and kind.direction == "out":
            seen_name = domains[0].replace("*.", "www.")
            parts.append(f"names: {json.dumps(seen_name)}")
        given = f"{process}, connection: {{{', '.join(parts)}}}"
        yield _test(f"{name} as it was seen, {number}", given, f"action: allow, rule: {name}")
    strange = f"connection: {{direction: out, remote: {STRANGER}, port: {_unused_port(one)}}}"
    yield _test(f"{name} as it never was", f"{process}, {strange}", f"action: deny, rule: {name}")


def _test(name: str, given: str, expect: str) -> str:
    return f"- {{name: {json.dumps(name)}, given: {{{given}}}, expect: {{{expect}}}}}"


def _unused_port(one: Behaviour) -> int:
    taken = [kind.ports for kind in one.kinds if kind.ports and kind.direction == "out"]
    return next(port for port in (4444, 1337, 6667, 31337, 81) if not any(low <= port <= high for low, high in taken))


def _profile_names(found: tuple[Behaviour, ...]) -> dict[int, str]:
    names: dict[int, str] = {}
    for one in found:
        base = base_name(one.program.image).lower().removesuffix(".exe")
        word = "-".join(filter(None, (base, (one.program.service or "").lower())))
        word = re.sub(r"[^a-z0-9]+", "-", word).strip("-")[:50] or "program"
        word = f"the-{word}" if word in RESERVED else word
        taken = set(names.values())
        names[id(one)] = next(
            text
            for number in range(1, len(found) + 2)
            if (text := f"{word}-{number}" if number > 1 else word) not in taken
        )
    return names


def _title(one: Behaviour) -> str:
    return one.program.image + (f" ({one.program.service})" if one.program.service else "")


def _comment(text: str) -> str:
    """One line, whatever the guest put into a name."""
    return "# " + _PLAIN.sub("?", text)[:_COMMENT]
