"""The client of xenstore against a xenstored that is made up."""

import select
import socket
import struct

import pytest

from appliance.errors import HostError, PermissionRefused
from appliance.hosts.xenstore import LOST, MAX_EVENTS, XenStore
from tests.worlds.xenstored import EVENT, HEADER, Xenstored

TREE = {"/tool": "", "/a/b": "1", "/a/c/d": "2", "/long": "x" * 4000, "/n": "42", "/odd": "4²", "/neg": "-1"}


@pytest.fixture
def daemon(tmp_path):
    made = Xenstored(tmp_path, TREE)
    yield made
    made.close()


@pytest.fixture
def store(daemon):
    with XenStore(daemon.path) as connection:
        yield connection


def is_told(store, seconds=20.0):
    """Wait until there is something to take."""
    return bool(select.select([store.fileno()], [], [], seconds)[0])


def test_values_and_children_are_read(store):
    assert (store.read("/a/b"), store.read("/tool"), store.read("/long")) == ("1", "", "x" * 4000)
    assert store.names("/a") == ["b", "c"]
    assert [store.read_number(path) for path in ("/n", "/odd", "/neg", "/tool", "/none")] == [
        42,
        None,
        None,
        None,
        None,
    ]


def test_what_is_not_there_is_none(store):
    assert store.read("/none") is None and store.names("/none") == [] and store.names("/tool") == []


def test_a_directory_too_large_for_one_answer_is_read_in_parts(daemon, store):
    names = [f"domain-number-{number}" for number in range(1000)]
    daemon.tree |= {f"/big/{name}": "" for name in names}
    assert store.names("/big") == names


def test_changes_are_told_by_the_word_of_their_watch(daemon, store):
    store.watch("/a", "mine")
    assert is_told(store), "the first event came with the answer and was not told"
    assert store.events() == [("/a", "mine")]
    assert not is_told(store, 0) and store.events() == []
    daemon.write("/a/c/e", "3")
    daemon.write("/a/c/e", "4")
    daemon.write("/n", "5")
    assert is_told(store) and store.events() == [("/a/c/e", "mine")]
    store.unwatch("/a", "mine")
    daemon.write("/a/b", "9")
    assert store.read("/a/b") == "9" and store.events() == []


def test_events_that_come_while_an_answer_is_awaited_are_kept_and_told(daemon, store):
    store.watch("/a", "mine")
    store.events()
    daemon.write("/a/b", "7")
    assert store.read("/a/b") == "7"
    assert is_told(store), "it came before the answer and was not told"
    assert store.events() == [("/a/b", "mine")] and not is_told(store, 0)


def test_more_events_than_are_kept_are_told_as_lost(daemon, store):
    store.watch("/a", "mine")
    store.events()
    for number in range(MAX_EVENTS + 10):
        daemon.fire(f"/a/{number}")
        if number % 100 == 0:
            store.read("/n")
    told = []
    while is_told(store, 0):
        told += store.events()
        store.read("/n")
    assert LOST in told and len(told) <= MAX_EVENTS + 11


def test_a_daemon_that_does_not_answer_is_an_error_in_bounded_time(daemon):
    daemon.stalled.set()
    with XenStore(daemon.path, timeout_s=0.05) as store:
        with pytest.raises(HostError, match="does not answer"):
            store.read("/a/b")
        with pytest.raises(HostError, match="closed"):
            store.read("/a/b")
        with pytest.raises(HostError, match="closed"):
            store.events()
        assert store.fileno() == -1


def test_a_daemon_that_is_gone_is_told_and_can_be_asked_again_when_it_is_back(daemon, store):
    store.watch("/a", "mine")
    store.events()
    daemon.restart()
    assert is_told(store)
    with pytest.raises(HostError, match="gone"):
        store.events()
    with pytest.raises(HostError, match="closed"):
        store.read("/a/b")
    with XenStore(daemon.path) as again:
        assert again.read("/a/b") == "1"


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [("EACCES", PermissionRefused, "root"), ("EINVAL", HostError, "Invalid argument"), ("EODD", HostError, "EODD")],
)
def test_errors_are_told_with_what_was_asked(daemon, store, code, kind, text):
    daemon.refused["/a/b"] = code
    with pytest.raises(kind, match=f"/a/b.*{text}"):
        store.read("/a/b")
    assert store.read("/n") == "42", "an error about one path spoils the connection"


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 64, HEADER.pack(EVENT, 0, 0, 5000), HEADER.pack(3, 1, 0, 0), HEADER.pack(2, 1, 0, 4096) + b"x" * 9],
    ids=["noise", "too long", "another answer", "cut short"],
)
def test_what_is_no_xenstored_cannot_hang_or_confuse_us(tmp_path, data):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "other"))
    listener.listen()
    with XenStore(str(tmp_path / "other"), timeout_s=0.2) as store:
        peer, _ = listener.accept()
        peer.sendall(data)
        with pytest.raises(HostError):
            store.read("/a")
        peer.close()
    listener.close()


def test_a_question_that_is_too_long_is_not_sent(store):
    with pytest.raises(HostError, match="too long"):
        store.read("/" + "x" * 5000)
    assert store.read("/n") == "42"


def test_a_host_without_xenstored_says_how_to_start_it(tmp_path):
    with pytest.raises(HostError, match="systemctl start xenstored"):
        XenStore(str(tmp_path / "none"))


def test_an_answer_to_an_earlier_question_is_not_taken_for_this_one(daemon, store):
    daemon.send_to_all(struct.pack("=IIII", 2, 999, 0, 3) + b"old")
    assert store.read("/n") == "42"
