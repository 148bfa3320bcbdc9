"""Orders from outside for one guest's watch: what a person says of a flow is the last word on it."""

import pytest

from appliance.engine import Engine
from appliance.front import Front
from appliance.messages import Tick
from appliance.model import Act, Finding, FlowEnd, FlowEnded, HoldPolicy, Match
from appliance.respond import Mailbox
from appliance.watch import GuestWatch
from tests.test_watch import LIVE, Clock, Enforced, Eye, Hand, Tap, held, started
from tests.worlds.nouns import NoNames, flow, owner

HOUR_NS = 3600 * 10**9


def front(hand, *events, actions=("hold",)):
    eye, engine, reports = Eye(Finding(Match.EXACT, (owner(),))), Engine(Enforced(*actions), NoNames()), []
    watch = GuestWatch(LIVE, Tap(), eye, engine, reports.append, Clock(), hand=hand, hold=HoldPolicy())
    for event in events:
        watch.take(event)
    return Front(watch, hand, "tc+ring", 0, Mailbox()), reports


@pytest.mark.parametrize("act", [Act.BLOCK, Act.RESET])
@pytest.mark.parametrize("event", [held(), started()], ids=["held", "under way"])
def test_who_stops_a_flow_that_waits_for_a_person_has_decided(act, event):
    hand = Hand()
    one, reports = front(hand, event)
    assert len(one.held()) == 1
    assert one.act(flow().id, act, "ada")
    assert one.held() == []
    one.watch.take(Tick(one.watch.clock() + HOUR_NS))
    one.watch._catch_up(quiet=True)  # the search for foreign code, after which it is told
    assert reports[-1].judgement.because.endswith("ada: block")
    assert "release" not in [done[0] for done in hand.done]


def test_an_act_that_was_not_done_is_not_counted():
    one, _ = front(Hand(refuses=("block", "release")), started(), actions=())
    assert not one.act(flow(9).id, Act.BLOCK, "ada")
    assert not one.act(flow(9).id, Act.RELEASE, "ada")
    assert dict(one.watch.summary.acts) == {"reset": 1}


def test_a_flow_that_is_over_is_not_decided_on():
    one, _ = front(Hand(), held())
    one.watch.take(FlowEnded(flow().id, FlowEnd.RST, None, one.watch.clock()))
    assert not one.decide(flow().id, True, "root")
