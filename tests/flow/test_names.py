from dataclasses import replace
from ipaddress import ip_address

import dns.message
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.flow.names import Names
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, FlowPayload, Transport
from tests.flow.packets import T0, VM, S

RESOLVER = ip_address("10.0.0.53")
FLOW = Flow(
    FlowId(VM, 1),
    FiveTuple(Transport.UDP, Endpoint(ip_address("10.0.0.2"), 4000), Endpoint(RESOLVER, 53)),
    Direction.OUT,
    T0,
)


def answer(asked: str, *records: tuple[str, int, str, str]) -> bytes:
    message = dns.message.make_response(dns.message.make_query(asked, "A"))
    message.answer = [dns.rrset.from_text(name, ttl, "IN", kind, value) for name, ttl, kind, value in records]
    return message.to_wire()


def payload(data: bytes, direction: Direction = Direction.IN) -> FlowPayload:
    return FlowPayload(FLOW.id, direction, 0, data, T0)


CHAIN = answer(
    "www.Example.org.",
    ("www.example.org.", 300, "CNAME", "cdn.example.net."),
    ("cdn.example.net.", 300, "A", "192.0.2.7"),
    ("other.example.", 300, "A", "192.0.2.99"),
)


def test_an_address_is_known_by_the_name_that_was_asked() -> None:
    names = Names()
    names.observe(payload(CHAIN), FLOW)
    assert names.names_of(ip_address("192.0.2.7"), T0) == ("www.example.org",)
    assert names.names_of(ip_address("::ffff:192.0.2.7"), T0) == ("www.example.org",)
    assert names.answers == 1


def test_records_beside_the_chain_are_not_believed() -> None:
    names = Names()
    names.observe(payload(CHAIN), FLOW)
    assert names.names_of(ip_address("192.0.2.99"), T0) == ()


def test_a_name_is_kept_for_an_hour_after_its_ttl() -> None:
    names = Names()
    names.observe(payload(answer("a.b.", ("a.b.", 60, "AAAA", "2001:db8::1"))), FLOW)
    assert names.names_of(ip_address("2001:db8::1"), T0 + 3659 * S) == ("a.b",)
    assert names.names_of(ip_address("2001:db8::1"), T0 + 3661 * S) == ()


def test_the_newest_name_comes_first_and_memory_is_bounded() -> None:
    names = Names(limit=2)
    for host in ("one.x.", "two.x."):
        names.observe(payload(answer(host, (host, 60, "A", "192.0.2.1"))), FLOW)
    assert names.names_of(ip_address("192.0.2.1"), T0) == ("two.x", "one.x")
    for last in (2, 3):
        names.observe(payload(answer("z.x.", ("z.x.", 60, "A", f"192.0.2.{last}"))), FLOW)
    assert len(names) == 2
    assert names.names_of(ip_address("192.0.2.1"), T0) == ()


@pytest.mark.parametrize("change", ["question", "port", "tcp", "resolver"])
def test_only_answers_of_a_believed_server_to_the_guest_count(change: str) -> None:
    flow, direction, names = FLOW, Direction.IN, Names()
    match change:
        case "question":
            direction = Direction.OUT
        case "port":
            flow = replace(FLOW, tuple=replace(FLOW.tuple, remote=Endpoint(RESOLVER, 5353)))
        case "tcp":
            flow = replace(FLOW, tuple=replace(FLOW.tuple, protocol=Transport.TCP))
        case "resolver":
            names = Names(resolvers=[ip_address("10.0.0.54")])
    names.observe(payload(CHAIN, direction), flow)
    assert (len(names), names.unparsable) == (0, 0)


@given(st.binary(max_size=300), st.integers(0, len(CHAIN)), st.booleans())
def test_any_bytes_are_an_answer_or_counted(noise: bytes, cut: int, patch: bool) -> None:
    names = Names()
    names.observe(payload(CHAIN[:cut] + noise + (CHAIN[cut + len(noise) :] if patch else b"")), FLOW)
    assert names.answers + names.unparsable <= 1
