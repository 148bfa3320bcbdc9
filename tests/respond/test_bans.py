"""The ban book: who is banned until when, whatever the order and the overlap; and what is never banned."""

import json
import subprocess
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import ConfigError
from appliance.respond import host_addresses, spare
from appliance.respond.banfile import read_bans, write_bans
from appliance.respond.bans import FOREVER, Ban, BanBook, BanRefused
from appliance.respond.never import ALWAYS, read_never_ban

A, B = "guest-a", "guest-b"


def net(text):
    return ip_network(text)


def ban(peer, guest=None, until_ns=FOREVER, since_ns=0):
    return Ban(net(peer), guest, since_ns, until_ns)


# A small world, so that networks meet: 203.0.113.0/24 and below, and one IPv6 corner with the same leading bits.
peers = st.one_of(
    st.builds(
        lambda bits, length: ip_network((0xCB007100 | bits, length), strict=False),
        st.integers(0, 15),
        st.integers(26, 32),
    ),
    st.builds(
        lambda bits, length: ip_network(((0xCB007100 << 96) | bits, length), strict=False),
        st.integers(0, 15),
        st.sampled_from([24, 120, 124, 126, 128]),
    ),
)
scopes = st.sampled_from([None, A, B])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ban"), peers, scopes, st.one_of(st.just(FOREVER), st.integers(1, 40))),
        st.tuples(st.just("lift"), peers, scopes, st.just(0)),
        st.tuples(st.just("wait"), st.just(None), st.just(None), st.integers(1, 10)),
    ),
    max_size=25,
)


class Kernel:
    """One guest's map: the longest prefix that matches decides alone, and ends by itself."""

    def __init__(self):
        self.entries = {}

    def drops(self, ip, now):
        found = [peer for peer in self.entries if ip in peer]
        return bool(found) and self.entries[max(found, key=lambda peer: peer.prefixlen)] > now


def play(moves, check):
    """Play moves on the book, on kernels kept by ``touched`` and ``until`` alone, and on a plain list of bans."""
    book, now, plain = BanBook(), 0, {}
    kernels = {A: Kernel(), B: Kernel()}

    def keep(touched):
        for guest, kernel in kernels.items():
            for peer in touched:
                until = book.until(peer, guest)
                if until is None:
                    kernel.entries.pop(peer, None)
                else:
                    kernel.entries[peer] = until

    for what, peer, guest, number in moves:
        if what == "ban":
            until = number if number == FOREVER else now + number
            book.add(Ban(peer, guest, now, until))
            plain[guest, peer] = until
            keep(book.touched(peer))
        elif what == "lift":
            assert bool(book.lift(peer, guest)) == (plain.pop((guest, peer), 0) > 0)
            keep(book.touched(peer))
        else:
            now += number
            check(book, plain, kernels, now)  # before the book has noticed what has ended
            for ended in book.expire(now):
                keep(book.touched(ended.peer))
        plain = {key: until for key, until in plain.items() if until > now}
        check(book, plain, kernels, now)


@settings(max_examples=120, deadline=None)
@given(steps)
def test_the_kernel_drops_an_address_exactly_while_a_ban_covers_it(moves):
    addresses = [ip_address(0xCB007100 | bits) for bits in range(16)]
    addresses += [ip_address((0xCB007100 << 96) | bits) for bits in (0, 3, 15)]

    def check(book, plain, kernels, now):
        for guest, kernel in kernels.items():
            for ip in addresses:
                wanted = any(
                    scope in (None, guest) and ip in peer and until > now for (scope, peer), until in plain.items()
                )
                assert kernel.drops(ip, now) == wanted, (guest, ip)

    play(moves, check)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_book_holds_the_bans_that_stand_and_no_other(moves):
    def check(book, plain, kernels, now):
        standing = {(one.guest, one.peer): one.until_ns for one in book if one.until_ns > now}
        assert standing == {key: until for key, until in plain.items() if until > now}
        assert len(book) == len(list(book))
        for guest in (A, B):
            assert book.entries(guest) == {one.peer for one in book if one.guest in (None, guest)}

    play(moves, check)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_lifting_everything_leaves_an_empty_book_and_empty_kernels(moves):
    book = BanBook(limit=1000)
    for what, peer, guest, until in moves:
        if what == "ban":
            book.add(Ban(peer, guest, 0, until))
    for one in list(book):
        assert book.lift(one.peer, one.guest) == [one]
        assert book.until(one.peer, A) is None or book.entries(A)
    assert len(book) == 0
    assert book.entries(A) == set()
    assert not list(book)


def test_a_new_ban_replaces_the_old_one_of_the_same_peer():
    book = BanBook()
    first, second = ban("203.0.113.9/32", until_ns=50), ban("203.0.113.9/32", until_ns=20)
    assert book.add(first) is None
    assert book.add(second) is first
    assert list(book) == [second]
    assert book.expire(20) == [second]


def test_a_short_ban_inside_a_long_one_does_not_end_it():
    book = BanBook()
    book.add(ban("203.0.113.0/24", until_ns=100))
    book.add(ban("203.0.113.9/32", until_ns=10))
    assert book.until(net("203.0.113.9/32"), A) == 100
    book.lift(net("203.0.113.0/24"))
    assert net("203.0.113.9/32") in book.touched(net("203.0.113.0/24"))
    assert book.until(net("203.0.113.9/32"), A) == 10


def test_a_ban_of_one_guest_is_no_business_of_another():
    book = BanBook()
    book.add(ban("203.0.113.9/32", A, until_ns=10))
    book.add(ban("203.0.113.9/32", until_ns=5))
    assert (book.until(net("203.0.113.9/32"), A), book.until(net("203.0.113.9/32"), B)) == (10, 5)
    assert (book.count(A), book.count(B)) == (2, 1)
    assert len(book.lift(net("203.0.113.9/32"), everywhere=True)) == 2


def test_what_covers_a_peer_is_told_widest_first():
    book = BanBook()
    for peer in ("203.0.113.9/32", "203.0.113.0/24", "203.0.0.0/16", "203.0.113.8/32"):
        book.add(ban(peer))
    assert [str(one.peer) for one in book.covering(net("203.0.113.9/32"))] == [
        "203.0.0.0/16",
        "203.0.113.0/24",
        "203.0.113.9/32",
    ]


def test_a_full_book_refuses_with_words_and_the_other_family_has_room():
    book = BanBook(limit=3)
    for number in range(3):
        book.add(ban(f"203.0.113.{number}/32"))
    with pytest.raises(BanRefused, match="3 bans of IPv4 already"):
        book.add(ban("203.0.113.3/32"))
    book.add(ban("203.0.113.2/32", until_ns=7))  # a replacement needs no room
    book.add(ban("2001:db8::1/128"))
    book.lift(net("203.0.113.1/32"))
    book.add(ban("203.0.113.3/32"))


def test_the_kernels_map_can_be_filled_to_the_brim():
    book = BanBook()
    for number in range(16_384):
        book.add(ban(str(ip_address(0x0B000000 + number))))
    with pytest.raises(BanRefused, match="16384"):
        book.add(ban("203.0.113.3/32"))
    assert len(book.entries(A)) == 16_384


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ("127.0.0.1/32", "loopback"),
        ("127.0.0.0/8", "loopback"),
        ("0.0.0.0/0", "loopback"),
        ("::/0", "loopback"),
        ("::1/128", "loopback"),
        ("0.0.0.0/32", "DHCP"),
        ("255.255.255.255/32", "DHCP"),
        ("ff02::1/128", "routers"),
        ("192.0.2.7/32", "an address of this host"),
        ("192.0.2.0/24", "an address of this host"),
        ("2001:db8::7/128", "an address of this host"),
        ("2001:db8::/32", "an address of this host"),
    ],
)
def test_a_ban_that_would_cover_what_is_never_banned_is_refused_with_the_reason(peer, why):
    book = BanBook(spare([ip_address("192.0.2.7"), ip_address("2001:db8::7")]))
    with pytest.raises(BanRefused, match=why):
        book.add(ban(peer))
    assert not list(book)


@settings(max_examples=100, deadline=None)
@given(peers, st.lists(peers, max_size=4))
def test_no_ban_in_the_book_ever_meets_the_never_ban_list(peer, never):
    spared = tuple(one for one in (*ALWAYS,)) + tuple(type(ALWAYS[0])(network, "listed") for network in never)
    book = BanBook(spared)
    try:
        book.add(Ban(peer, None, 0))
    except BanRefused:
        assert any(one.version == peer.version and one.overlaps(peer) for one in never)
    else:
        assert not any(one.version == peer.version and one.overlaps(peer) for one in never)


# -- the operator's list --


def test_the_operators_list_is_read_with_its_reasons(tmp_path):
    path = tmp_path / "never-ban.yaml"
    path.write_text("never_ban:\n  - {net: 192.0.2.1, why: the gateway}\n  - 2001:db8::/48\n  - ::ffff:198.51.100.7\n")
    listed = read_never_ban(path)
    assert [(str(one.network), one.why) for one in listed] == [
        ("192.0.2.1/32", "the gateway"),
        ("2001:db8::/48", "never-ban.yaml"),
        ("198.51.100.7/32", "never-ban.yaml"),
    ]
    assert set(ALWAYS) < set(spare(path=path))


def test_the_addresses_of_this_host_are_found():
    told = json.loads(subprocess.run(["ip", "-j", "addr"], check=True, capture_output=True).stdout)
    wanted = {ip_address(one["local"]) for link in told for one in link.get("addr_info", ()) if "UP" in link["flags"]}
    assert wanted <= set(host_addresses())


def test_an_empty_list_is_a_list(tmp_path):
    path = tmp_path / "never-ban.yaml"
    path.write_text("never_ban:\n")
    assert read_never_ban(path) == ()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "a: [",
        "\x00",
        "never_ban: 7",
        "never_ban: [1]",
        "never_ban: [300.1.1.1]",
        "never_ban: [10.0.0.1/8]",
        "never_ban: []\nmore: 1",
        "never_ban: [{why: nothing}]",
        "never_ban: [{net: 1.2.3.4, why: 5}]",
        "never_ban: [{net: 1.2.3.4, x: y}]",
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_name(tmp_path, content):
    path = tmp_path / "never-ban.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"never-ban\.yaml"):
        read_never_ban(path)


def test_a_list_that_is_not_there_is_told_so(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        spare(path=tmp_path / "none.yaml")


# -- the file --


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(peers, scopes, st.one_of(st.just(FOREVER), st.integers(1, 2**62)), st.text(max_size=20))))
def test_bans_come_back_from_disk_as_they_were(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("state") / "bans.json"
    bans = [Ban(peer, guest, 5, until, "because", who, guest) for peer, guest, until, who in entries]
    write_bans(path, bans)
    assert read_bans(path) == (bans, [])
    assert [one.name for one in path.parent.iterdir()] == ["bans.json"]


def test_without_a_file_there_are_no_bans(tmp_path):
    assert read_bans(tmp_path / "bans.json") == ([], [])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 2, "bans": []}', '{"version": 1}', "[" * 50_000]
)
def test_a_broken_file_is_set_aside_and_told(tmp_path, content):
    path = tmp_path / "bans.json"
    path.write_text(content)
    bans, notes = read_bans(path)
    assert bans == []
    assert "set aside" in notes[0]
    assert (tmp_path / "bans.json.broken").read_text() == content


def test_one_bad_entry_does_not_cost_the_others(tmp_path):
    path = tmp_path / "bans.json"
    write_bans(path, [ban("203.0.113.9/32"), ban("203.0.113.8/32")])
    text = path.read_text()
    for bad in ('"peer": 7', '"peer": "x"', '"peer": null'):
        path.write_text(text.replace('"peer": "203.0.113.9/32"', bad))
        bans, notes = read_bans(path)
        assert [str(one.peer) for one in bans] == ["203.0.113.8/32"]
        assert len(notes) == 1
    path.write_text(text.replace('"until_ns": null', '"until_ns": Infinity', 1))
    assert len(read_bans(path)[0]) == 1


def test_a_folder_that_cannot_be_written_is_told_and_the_old_file_stands(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ConfigError, match="forgotten"):
        write_bans(tmp_path / "file" / "bans.json", [])
    assert (tmp_path / "file").read_text() == "old"
