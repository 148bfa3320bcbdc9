"""The judge, against the obvious way to write one: every profile in turn, with fnmatch and ipaddress."""

import fnmatch
import ipaddress
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

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
    Owner,
    ProcessKey,
    Transport,
)
from appliance.rules import Subject, load_text
from tests.bench.lab import Lab
from tests.bench.measure import interleave, settled
from tests.bench.report import Line

SHIPPED = Path(__file__).resolve().parents[2] / "rules" / "debian-server.yaml"
IMAGES = ("/usr/sbin/nginx", "/usr/sbin/sshd", "/usr/bin/python3.11", "/opt/app/bin/server", "/tmp/x")
REMOTES = ("10.77.0.1", "203.0.113.9", "2001:db8::7", "192.168.1.5")
ROUND, MANY = 200, 300


def run(lab: Lab) -> Iterator[Line]:
    subjects = list(make_subjects())
    batches = max(2, lab.sizes.items // ROUND)
    for what, text in (("shipped debian-server", SHIPPED.read_text()), (f"{MANY} profiles", many_profiles(MANY))):
        book, naive = load_text(text), naive_judge(yaml.safe_load(text)["spec"])
        todo = [subjects[number % len(subjects)] for number in range(ROUND)]
        judge = book.judge
        with settled():
            ours, theirs = interleave(
                min(batches, 60),
                lambda todo=todo, judge=judge: [judge(one) for one in todo],
                lambda todo=todo, naive=naive: [naive(one) for one in todo],
                each=ROUND,
            )
        note = f"{1 / ours.p50:,.0f} judgements a second"
        yield Line("rules", f"one judgement, {what}", "us", ours, "naive fnmatch", theirs, note=note)
    text = many_profiles(MANY)
    loads, parses = interleave(2, lambda: load_text(text), lambda: yaml.safe_load(text))
    yield Line("rules", f"load {MANY} profiles, checked", "ms", loads, "yaml.safe_load", parses)


def make_subjects() -> Iterator[Subject]:
    """Connections out and in, of several programs, to several places."""
    for number, image in enumerate(IMAGES):
        name = image.rpartition("/")[2]
        owner = Owner(GuestProcess(ProcessKey(100 + number, 5), name, image, image, 1, 33), (3,))
        for remote in REMOTES:
            far = ipaddress.ip_address(remote)
            near = ipaddress.ip_address("10.77.0.7" if far.version == 4 else "fd77::7")
            for direction, lport, rport in ((Direction.OUT, 40000, 443), (Direction.IN, 80, 51000)):
                key = FiveTuple(Transport.TCP, Endpoint(near, lport), Endpoint(far, rport))
                flow = Flow(FlowId(GuestId("qemu:1"), number), key, direction, 1)
                yield Subject(flow, Binding(Match.EXACT, None, (owner,), 0), os="linux")


def many_profiles(count: int) -> str:
    """A rule set of many programs."""
    profiles = [
        {
            "name": f"program-{number}",
            "match": {"image": f"/opt/app{number}/bin/*" if number % 4 else f"/usr/bin/program{number}"},
            "default": "deny",
            "allow": [
                {"direction": "out", "protocol": "tcp", "ports": [80, 443], "to": {"ips": f"10.{number % 256}.0.0/16"}}
            ],
        }
        for number in range(count)
    ]
    document = {"apiVersion": "v1", "kind": "RuleSet", "metadata": {"name": "many"}, "spec": {"processes": profiles}}
    return yaml.safe_dump(document)


def naive_judge(spec: dict[str, Any]) -> Callable[[Subject], str]:
    """The peer. It knows less (no lists of domains, no owners in the plural, no reasons), which is to its advantage."""
    profiles = []
    for profile in spec["processes"]:
        images = profile["match"].get("image", [])
        profiles.append(
            (
                [images] if isinstance(images, str) else images,
                profile.get("default", "allow"),
                [_entry(entry) for entry in profile.get("allow", ())],
                [_entry(entry) for entry in profile.get("deny", ())],
            )
        )

    def judge(subject: Subject) -> str:
        path = subject.binding.owners[0].process.path
        for images, default, allow, deny in profiles:
            if any(fnmatch.fnmatchcase(path, image) for image in images):
                if any(_covers(entry, subject.flow) for entry in deny):
                    return "deny"
                return "allow" if any(_covers(entry, subject.flow) for entry in allow) else default
        return "allow"

    return judge


def _entry(entry: dict[str, Any]) -> tuple[str | None, set[str], set[int], list[Any]]:
    def many(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [] if value is None else [value]

    ips = [ipaddress.ip_network(ip) for ip in many((entry.get("to") or {}).get("ips")) if isinstance(ip, str)]
    ports = {port for port in many(entry.get("ports")) if isinstance(port, int)}
    return entry.get("direction"), set(many(entry.get("protocol"))), ports, ips


def _covers(entry: tuple[str | None, set[str], set[int], list[Any]], flow: Flow) -> bool:
    direction, protocols, ports, ips = entry
    if direction and direction != flow.direction.value:
        return False
    if protocols and flow.tuple.protocol.value not in protocols:
        return False
    port = flow.tuple.local.port if flow.direction is Direction.IN else flow.tuple.remote.port
    if ports and port not in ports:
        return False
    return not ips or any(flow.tuple.remote.ip in network for network in ips)
