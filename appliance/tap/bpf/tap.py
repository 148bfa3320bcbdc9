"""The packet eye and the hand in the kernel (``appliance.ports.PacketTap``, ``PacketHand``).

Events of a ring become flow events. Numbers, directions and ends are those of ``appliance/flow/table.py``; packets are
only ever counted by the kernel. A sweep (``sweep.py``) makes up for what the ring had no room for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from appliance.errors import HostError, UsageError
from appliance.model import (
    Decision,
    Decoy,
    FlowEnd,
    FlowEvent,
    FlowId,
    GuestId,
    GuestPort,
    HoldPolicy,
    IpAddress,
    TapStats,
)
from appliance.tap.bpf import layout
from appliance.tap.bpf.guard import Guard
from appliance.tap.bpf.hand import Hand, parse_mac
from appliance.tap.bpf.heart import PATIENCE_S, Heart
from appliance.tap.bpf.hook import Hook, hang, open_ring
from appliance.tap.bpf.inject import Injector
from appliance.tap.bpf.known import Known
from appliance.tap.bpf.layout import IGNORED
from appliance.tap.bpf.loader import MAX_FLOWS, PROGRAMS, RING_BYTES, Loaded
from appliance.tap.bpf.netdev import Netdevs
from appliance.tap.bpf.opening import CommunityId, Openings
from appliance.tap.bpf.sweep import Sweep
from appliance.tap.bpf.syscalls import count_cpus
from appliance.tap.bpf.telling import Teller

BATCH: Final = 64  # a flow that has just begun waits for no more than these
CHECK_NS: Final = 250_000_000
_log: Final = logging.getLogger("parasight.tap")


class KernelTap:
    """The packet eye on the ports of one guest, all in one network namespace; used by one thread, but for ``beat``.

    ``clock`` tells the time since the Unix epoch; ``community_id`` is ``appliance.flow.community.community_id``. Raises
    UsageError, PermissionRefused and HostError; then nothing of ours is left on the ports. ``patience_s``: without a
    heartbeat for so long, the kernel lets everything pass, or with ``fail_closed`` keeps its verdicts.
    """

    def __init__(
        self,
        vm: GuestId,
        ports: Sequence[GuestPort],
        clock: Callable[[], int],
        *,
        community_id: CommunityId,
        max_flows: int = MAX_FLOWS,
        ring_bytes: int = RING_BYTES,
        fail_closed: bool = False,
        patience_s: float = PATIENCE_S,
        transport: layout.Transport = layout.Transport.RING,
        programs: tuple[str, ...] = PROGRAMS,
    ) -> None:
        if len({port.netns for port in ports}) != 1:
            raise UsageError("a kernel tap needs ports, all of one network namespace")
        self.vm = vm
        self._clock = clock
        self._openings = Openings(vm, community_id, clock())
        self._known = Known(self._openings)
        self._events = self._lost = 0
        self._gone = self._closed = False
        self._final: TapStats | None = None
        self._cpus = count_cpus()
        self._next_check_ns = 0
        netns = ports[0].netns
        with ExitStack() as undo:
            self._loaded = Loaded(max_flows, ring_bytes, transport=transport, programs=programs)
            undo.callback(self._loaded.close)
            self._maps = self._loaded.maps
            self._ring = open_ring(transport, self._maps["events"], ring_bytes)
            undo.callback(self._ring.close)
            self._netdevs = Netdevs(netns)
            undo.callback(self._netdevs.close)
            self._guard = Guard(netns)
            undo.callback(self._guard.close)
            self._heart = Heart(self._maps["ports"], fail_closed=fail_closed, patience_s=patience_s)
            inject = self._loaded.programs.get("inject", -1)
            self._injector = Injector(netns, inject, self._maps["tail"], self._heart.mark)
            undo.callback(self._injector.close)
            self._hand = Hand(self._maps, self._known, self._heart, self._injector, self._netdevs.find)
            self._acts = inject >= 0  # on a packet socket the program only observes
            self._sweep = Sweep(self._maps["flows"], self._known, self._hand, clock)
            self._teller = Teller(self._known, self._openings, self._hand, self._sweep)
            self._hooks: list[Hook] = []
            for port in ports:
                self._hang(port, undo)
            self._heart.add((hook.ifindex, layout.SWAPPED if hook.swapped else 0) for hook in self._hooks)
            undo.pop_all()

    # -- PacketTap --

    def poll(self, timeout_s: float) -> list[FlowEvent]:
        """Wait at most ``timeout_s``, then return a batch of events: what is there, never waiting for more."""
        if self._closed:
            return []
        self._hand.expire(time.monotonic_ns())
        events: list[FlowEvent] = []
        if self._known.pending:
            self._flush(events)
        elif not self._ring.ready and not self._ring.wait(self._limit(timeout_s)):
            self._check_ports()
        now_ns = time.monotonic_ns()
        self._heart.beat_if_due(now_ns)
        if now_ns >= self._next_check_ns:
            self._check_losses(now_ns)
            self._mend_hooks()
        for at in self._ring.records(BATCH):
            self._teller.take(self._ring.data, at, events)
        if self._sweep.is_due(now_ns, busy=self._ring.ready):
            self._run_sweep()
        self._events += len(events)
        return events

    @property
    def exhausted(self) -> bool:
        """All ports are gone and everything they told was read."""
        return self._closed or (self._gone and not self._known.pending and not self._ring.ready)

    def fileno(self) -> int:
        """The ring: readable while events wait."""
        return self._ring.fileno()

    def stats(self) -> TapStats:
        """Counters since the start. ``lost`` counts events that found the ring full; a sweep makes up for them."""
        if self._final is not None:
            return self._final
        packets, size, _, _, lost, unmade, _, _, _, *ignored = self._read_stats()
        reasons = tuple(sorted((name, count) for name, count in zip(IGNORED, ignored, strict=True) if count))
        flows = self._openings.flows
        return TapStats(packets, size, flows, self._events, lost + unmade, self._sweep.evicted, reasons)

    def close(self) -> list[FlowEvent]:
        """Let go what waits and may, detach, read what was told, and end the flows still open."""
        if self._closed:
            return []
        self._check_ports()
        self._hand.close()
        for hook in self._hooks:
            hook.detach()
        events = list(self._known.pending)
        self._known.pending.clear()
        for at in self._ring.records(1 << 20):
            self._teller.take(self._ring.data, at, events)
        self._run_sweep()
        events += self._known.pending
        now_ns = self._clock()
        reason = FlowEnd.GUEST_GONE if self._gone else FlowEnd.WATCH_ENDED
        events += [self._known.end(talk, reason, talk.counts, max(now_ns, talk.last_ns)) for talk in self._known]
        self._events += len(events)
        self._let_go()
        return events

    def abandon(self) -> None:
        """Stop as if we had been killed: all stays on the ports, and the kernel fails as the operator chose."""
        if not self._closed:
            self._let_go()
            for hook in self._hooks:
                hook.forget()

    def _let_go(self) -> None:
        self._final = self.stats()
        self._closed = True
        self._heart.stop()
        self._ring.close()
        self._injector.close()
        self._loaded.close()
        self._netdevs.close()
        self._guard.close()

    def beat(self) -> None:
        """Say to the kernel that we live; ``poll`` does so too. May be called from any thread."""
        self._heart.beat()

    # -- PacketHand --

    def hold_new(self, policy: HoldPolicy | None) -> None:
        """From now on new flows wait for a verdict; None: they do not."""
        self._must_act()
        self._hand.hold_new(policy)

    def release(self, flow: FlowId) -> bool:
        """Let a flow go on, whatever was decided before: what was held is sent on, in order."""
        return self._acts and self._hand.release(flow)

    def block(self, flow: FlowId, seconds: float | None = None, *, reset: bool = False) -> bool:
        """Drop its packets both ways; ``reset`` tells both ends of an established TCP connection that it is over."""
        return self._acts and self._hand.block(flow, seconds, reset=reset)

    def hold(self, flow: FlowId, seconds: float, default: Decision) -> bool:
        """Let its packets wait; after ``seconds`` without another act, ``default`` is what becomes of it."""
        return self._acts and self._hand.hold(flow, seconds, default)

    def redirect(self, flow: FlowId, decoy: Decoy) -> bool:
        """Send a held flow to the decoy instead; established ones cannot be redirected (False)."""
        return self._acts and self._hand.redirect(flow, decoy)

    def ban(self, peer: IPv4Network | IPv6Network, seconds: float | None = None) -> None:
        """Drop what comes from or goes to these addresses, existing flows too; None: until ``unban``."""
        self._must_act()
        self._hand.ban(peer, seconds)

    def unban(self, peer: IPv4Network | IPv6Network) -> bool:
        """Lift a ban; whether there was one."""
        return self._acts and self._hand.unban(peer)

    def dropped(self) -> int:
        """Packets dropped by verdict or ban."""
        return self._read_stats()[6]

    def held(self) -> int:
        """Packets that had to wait, repetitions included."""
        return self._read_stats()[7]

    @property
    def recovered(self) -> int:
        """Flows whose start was lost and which were found later."""
        return self._known.recovered

    def follow(self, ports: Iterable[GuestPort]) -> list[GuestPort]:
        """Take the guest's ports as they are now: those that have come are hung on and returned, those gone forgotten.

        Raises UsageError, PermissionRefused, HostError for one that cannot be had; the others are as they should be.
        """
        living = [hook for hook in self._hooks if self._netdevs.has(hook.ifindex)]
        for hook in self._hooks:
            if hook not in living:
                hook.detach()
                self._heart.forget(hook.ifindex)
        self._hooks = living
        known = {hook.ifindex for hook in living}
        come = [port for port in ports if self._netdevs.find(port.ifname) not in known]
        for port in come:
            with ExitStack() as undo:
                self._hang(port, undo)
                hook = self._hooks[-1]
                self._heart.add([(hook.ifindex, layout.SWAPPED if hook.swapped else 0)])
                undo.pop_all()
        return come

    def learn_listener(self, protocol: int, local_ip: IpAddress | None, port: int) -> None:
        """Note a server of the guest: a better direction for flows picked up midstream."""
        self._openings.learn_server(protocol, local_ip.packed if local_ip else b"", port)

    # -- now and then --

    def _limit(self, timeout_s: float) -> float:
        due_ns = self._hand.next_due_ns
        return max(0.0, min(timeout_s, (due_ns - time.monotonic_ns()) / 1e9)) if due_ns else timeout_s

    def _check_losses(self, now_ns: int) -> None:
        """A flow that waits while its event was lost must not wait for the next sweep."""
        self._next_check_ns = now_ns + CHECK_NS
        lost = self._read_stats()[4]
        if lost != self._lost:
            self._lost = lost
            self._sweep.hurry()

    def _run_sweep(self) -> None:
        self._sweep.run(lambda: not self._ring.ready)
        self._hand.verdicts.tidy()

    def _flush(self, events: list[FlowEvent]) -> None:
        pending = self._known.pending
        while pending and len(events) < BATCH:
            events.append(pending.popleft())

    # -- the ports --

    def _hang(self, port: GuestPort, undo: ExitStack) -> None:
        hook = hang(port, self._loaded.programs)
        undo.callback(hook.detach)
        self._hooks.append(hook)
        if hook.swapped:
            self._hand.set_swapped(hook.ifindex)
        if port.mac:
            mac = parse_mac(port.mac)
            self._teller.learn_mac(hook.ifindex, mac)
            for address in (mac, bytes(6)):  # zero: at least one is known
                self._maps["macs"].update(layout.MAC.pack(hook.ifindex, address), bytes(8))

    def _check_ports(self) -> None:
        self._gone = not any(self._netdevs.has(hook.ifindex) for hook in self._hooks)

    def _mend_hooks(self) -> None:
        """A foreign hand in traffic control may have taken our filters away; then nothing would be seen or held."""
        if not self._guard.has_changed({hook.ifindex for hook in self._hooks}):
            return
        for hook in self._hooks:
            try:
                if hook.mend():
                    _log.warning("our filters on port %s had been taken away: they hang again", hook.port.ifname)
            except HostError as error:
                _log.warning("our filters were taken away, and nothing is seen or held any more: %s", error)

    def _must_act(self) -> None:
        if not self._acts:
            raise HostError("the packet socket only observes: nothing can be held or blocked through it")

    def _read_stats(self) -> tuple[int, ...]:
        size = layout.STATS.size
        value = self._maps["stats"].lookup(bytes(4), size * self._cpus)
        if value is None:
            raise HostError("kernel tap: its counters are gone")
        return tuple(map(sum, zip(*layout.STATS.iter_unpack(value), strict=True)))
