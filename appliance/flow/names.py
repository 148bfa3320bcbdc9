"""The DNS names by which the guest knows an address, from the answers that it was sent (UDP port 53).

The only file of this room that knows dnspython. Answers are guest and network input: bounded, and what cannot be parsed
is counted. Sources: RFC 1035, RFC 2181 section 5.2, RFC 8020. An address keeps its name for an hour after the TTL:
programs cache longer than they should, and a connection outlives the answer. A name is what some server said, no
proof: name the ``resolvers`` that may be believed where rules depend on names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from appliance.model import Direction, Flow, FlowPayload, IpAddress, Transport

DNS_PORT: Final = 53
KEEP_NS: Final = 3600 * 1_000_000_000
MAX_TTL_S: Final = 7 * 86400  # RFC 8767, section 4
MAX_ADDRESSES: Final = 16384
MAX_NAMES: Final = 8  # per address
MAX_RECORDS: Final = 64  # per answer
MAX_CHAIN: Final = 16


class Names:
    """Names of addresses, newest first. Bounded: the address named longest ago is forgotten first."""

    def __init__(self, limit: int = MAX_ADDRESSES, resolvers: Iterable[IpAddress] = ()) -> None:
        self._limit = limit
        self._resolvers = frozenset(resolvers)  # empty: any server is believed
        self._names: OrderedDict[bytes, OrderedDict[str, int]] = OrderedDict()  # address -> name -> kept until
        self.answers = 0
        self.unparsable = 0

    def observe(self, payload: FlowPayload, flow: Flow) -> None:
        """Learn from a payload if it is a DNS answer to a question of the guest."""
        if (
            payload.direction is not Direction.IN
            or flow.tuple.protocol is not Transport.UDP
            or flow.tuple.remote.port != DNS_PORT
            or (self._resolvers and flow.tuple.remote.ip not in self._resolvers)
        ):
            return
        try:
            message = dns.message.from_wire(payload.data, ignore_trailing=True, one_rr_per_rrset=False)
        except (dns.exception.DNSException, ValueError):
            self.unparsable += 1  # also an answer that our snapshot cut short
            return
        if message.flags & dns.flags.QR and message.rcode() == dns.rcode.NOERROR and message.question:
            self.answers += 1
            answer = [rrset for rrset in message.answer[:MAX_RECORDS] if rrset.rdclass == dns.rdataclass.IN]
            self._learn(message.question[0].name, answer, payload.at_ns)

    def names_of(self, ip: IpAddress, at_ns: int) -> tuple[str, ...]:
        """The names whose answers gave this address, newest first."""
        names = self._names.get(_key(ip), OrderedDict[str, int]())
        return tuple(name for name, until_ns in reversed(names.items()) if at_ns <= until_ns)

    def __len__(self) -> int:
        return len(self._names)

    def _learn(self, asked: dns.name.Name, answer: list[dns.rrset.RRset], at_ns: int) -> None:
        """Follow the CNAME chain from the name that was asked; records beside the chain are not believed."""
        aliases = {rrset.name: rrset[0].target for rrset in answer if rrset.rdtype == dns.rdatatype.CNAME and rrset}
        chain = [asked]
        while len(chain) <= MAX_CHAIN and (target := aliases.get(chain[-1])) is not None and target not in chain:
            chain.append(target)
        text = asked.to_text(omit_final_dot=True).lower()
        for rrset in answer:
            if rrset.rdtype in {dns.rdatatype.A, dns.rdatatype.AAAA} and rrset.name in chain:
                until_ns = at_ns + min(max(rrset.ttl, 0), MAX_TTL_S) * 1_000_000_000 + KEEP_NS
                for rdata in list(rrset)[:MAX_RECORDS]:
                    self._note(_key(ip_address(rdata.address)), text, until_ns)

    def _note(self, address: bytes, name: str, until_ns: int) -> None:
        names = self._names.setdefault(address, OrderedDict())
        self._names.move_to_end(address)
        names[name] = max(until_ns, names.get(name, 0))
        names.move_to_end(name)
        if len(names) > MAX_NAMES:
            names.popitem(last=False)
        if len(self._names) > self._limit:
            self._names.popitem(last=False)


def _key(ip: IpAddress) -> bytes:
    mapped = ip.ipv4_mapped if ip.version == 6 else None
    return (ip if mapped is None else mapped).packed
