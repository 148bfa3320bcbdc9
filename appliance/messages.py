"""What the engine is told and what it asks for: events in, commands out. Values only.

Every event carries its own time (``at_ns``, nanoseconds since the Unix epoch), so that the engine needs no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.model import (
    Act,
    Decision,
    Evidence,
    Finding,
    Flow,
    FlowEvent,
    FlowId,
    GuestProcess,
    ProcessKey,
    Snapshot,
    Verdict,
)

# -- commands --


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask the guest eye who owns this flow now; answer with LookedUp."""

    flow: Flow


@dataclass(frozen=True, slots=True)
class Handle:
    """Do this to the flow, now; answer with Handled."""

    flow: FlowId
    act: Act
    seconds: float | None = None  # how long; None: until the flow ends
    default: Decision = Decision.ALLOW  # of HOLD: what becomes of it after ``seconds``
    target: str | None = None  # of REDIRECT: the decoy's name


@dataclass(frozen=True, slots=True)
class GatherEvidence:
    """Look for foreign code in this process; answer with EvidenceFound. Nobody waits for it: it may take its time."""

    flow: FlowId
    process: GuestProcess


@dataclass(frozen=True, slots=True)
class AskOther:
    """Ask another engine what it sees in this process; answer with OpinionFound, in some seconds."""

    process: GuestProcess


@dataclass(frozen=True, slots=True)
class Report:
    """A flow is judged: write it down, show it.

    ``again``: the same verdict, after a person or a deadline decided, or with another engine's opinion.
    """

    verdict: Verdict
    again: bool = False


Command = LookUp | Handle | GatherEvidence | AskOther | Report


# -- events beside the tap's --


@dataclass(frozen=True, slots=True)
class LookedUp:
    """The eye's answer to LookUp."""

    flow: FlowId
    finding: Finding
    at_ns: int


@dataclass(frozen=True, slots=True)
class Handled:
    """The hand's answer to Handle. ``done`` is None where there is no hand: a replay, a tap that can only look."""

    flow: FlowId
    act: Act
    done: bool | None
    at_ns: int


@dataclass(frozen=True, slots=True)
class Decided:
    """A person has decided on a flow that is held for one."""

    flow: FlowId
    allow: bool
    who: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class EvidenceFound:
    """The eye's answer to GatherEvidence."""

    flow: FlowId
    evidence: tuple[Evidence, ...]
    at_ns: int


@dataclass(frozen=True, slots=True)
class OpinionFound:
    """The other engine's answer to AskOther; without evidence, it has none or could not answer."""

    process: ProcessKey
    evidence: tuple[Evidence, ...]
    at_ns: int


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """A full look: seeds the process queue and the owners of connections that are already open."""

    snapshot: Snapshot
    os: str = ""  # what the guest runs, for rules that are meant for one system
    again: bool = False  # of the kernel that was looked at before


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at_ns: int


Event = FlowEvent | LookedUp | Handled | Decided | EvidenceFound | OpinionFound | SnapshotTaken | Tick
