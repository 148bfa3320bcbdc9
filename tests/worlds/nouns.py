"""Short ways to say the nouns in tests."""

from ipaddress import ip_address

from appliance.model import (
    Decision,
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowId,
    GuestId,
    GuestProcess,
    Judgement,
    Owner,
    ProcessKey,
    RuleRef,
    Transport,
)

VM = GuestId("qemu:4242", uuid="11111111-2222-3333-4444-555555555555", name="web-01")


def flow(
    number: int = 1,
    *,
    direction: Direction = Direction.OUT,
    protocol: Transport = Transport.TCP,
    remote: str = "203.0.113.9",
    remote_port: int = 443,
    local_port: int = 40000,
    started_ns: int = 1_000_000_000,
    midstream: bool = False,
) -> Flow:
    ends = Endpoint(ip_address("10.77.0.7"), local_port), Endpoint(ip_address(remote), remote_port)
    return Flow(FlowId(VM, number), FiveTuple(protocol, *ends), direction, started_ns, midstream=midstream)


def process(
    pid: int = 100, name: str = "nginx", path: str = "/usr/sbin/nginx", *, started_ns: int = 5, parent: int = 1
) -> GuestProcess:
    return GuestProcess(ProcessKey(pid, started_ns), name, path, path, parent, 0, task_va=0xFFFF888000001000 + pid)


def owner(pid: int = 100, **kwargs: str) -> Owner:
    return Owner(process(pid, **kwargs), (5,))


class Verbatim:
    """A judge that says what it was told to, and remembers what it was asked."""

    version = "test"

    def __init__(self, decision: Decision = Decision.ALLOW) -> None:
        self.decision, self.asked = decision, []

    def judge(self, subject):
        self.asked.append(subject)
        return Judgement(self.decision, RuleRef("test.yaml", 1, "test"), alert=self.decision is Decision.DENY)


class NoNames:
    def observe(self, payload, flow) -> None:
        pass

    def names_of(self, ip, at_ns):
        return ()
