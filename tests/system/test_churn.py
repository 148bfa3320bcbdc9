"""A guest that connects as fast as it can: no wrong owner, and nearly everything bound (B2, B3)."""

import pytest

from tests.system.churning import ALL, MATCHES, churn, compare, total

pytestmark = pytest.mark.system

SECONDS = 15


@pytest.fixture(scope="module")
def churned(guest, network, tmp_path_factory):
    watch, lines, _ = churn(guest, network, tmp_path_factory.mktemp("home"), seconds=SECONDS)
    return watch, lines


def test_no_owner_is_wrong_and_nearly_every_flow_is_bound(churned, capsys):
    watch, lines = churned
    counts, wrong = compare(watch.verdicts, lines)
    with capsys.disabled():
        print("\nchurn:", dict(sorted(counts.items())), "torn", watch.summary["torn"], "lost", watch.summary["lost"])
    assert not wrong
    flows = total(counts, ALL, MATCHES)
    assert flows > SECONDS * 20, "the guest did not churn"
    assert total(counts, ALL, ("not confirmed",)) <= 0.01 * flows
    assert total(counts, ("tcp-out",), ("exact",)) >= 0.97 * total(counts, ("tcp-out",), MATCHES)
    assert total(counts, ALL, ("exact", "listener", "unconnected")) >= 0.95 * flows


def test_every_miss_has_its_reason_and_every_loss_is_counted(churned):
    watch, _ = churned
    assert all(body["binding"]["reason"] for body in watch.verdicts if body["binding"]["match"] == "none")
    assert sum(watch.summary["bound"].values()) + sum(watch.summary["unbound"].values()) == watch.summary["flows"]
    assert watch.summary["flows"] == len(watch.verdicts)
    assert watch.summary["cpu_seconds"] > 0
    assert watch.summary["torn"] >= 0 and watch.summary["lost"] == 0


def test_the_guest_was_never_paused(churned, guest):
    assert not [event for event in guest.events if event["event"] in ("STOP", "RESUME")]
