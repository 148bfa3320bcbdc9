"""Symbol tables: what is found in them, and what is said of those that lack something or are damaged."""

import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError, Implausible, UnsupportedGuest
from appliance.guest.windows.isf import Field, PdbId, SymbolTable, parse_isf
from tests.worlds.windows.real import REAL, needs_real


def base(name):
    return {"kind": "base", "name": name}


RING = {"kind": "pointer", "subtype": {"kind": "struct", "name": "_LIST_ENTRY"}}
ISF = {
    "metadata": {
        "format": "6.1.0",
        "windows": {"pdb": {"GUID": "00112233445566778899aabbccddeeff", "age": 2, "database": "ntkrnlmp.pdb"}},
    },
    "base_types": {"pointer": {"size": 8}, "unsigned long": {"size": 4}, "void": {"size": 0}, "char": {"size": 1}},
    "enums": {"_STATE": {"base": "unsigned long", "size": 4, "constants": {"Ready": 1, "Running": 2}}},
    "user_types": {
        "_LIST_ENTRY": {
            "kind": "struct",
            "size": 16,
            "fields": {
                "Flink": {
                    "offset": 0,
                    "type": {"kind": "pointer", "subtype": {"kind": "struct", "name": "_LIST_ENTRY"}},
                },
                "Blink": {
                    "offset": 8,
                    "type": {"kind": "pointer", "subtype": {"kind": "struct", "name": "_LIST_ENTRY"}},
                },
            },
        },
        "_OUTER": {
            "kind": "struct",
            "size": 64,
            "fields": {
                "Links": {"offset": 8, "type": {"kind": "struct", "name": "_LIST_ENTRY"}},
                "State": {"offset": 24, "type": {"kind": "enum", "name": "_STATE"}},
                "Flag": {
                    "offset": 28,
                    "type": {"kind": "bitfield", "bit_position": 3, "bit_length": 5, "type": base("unsigned long")},
                },
                "Name": {"offset": 32, "type": {"kind": "array", "count": 15, "subtype": base("char")}},
                "Rings": {
                    "offset": 0,
                    "type": {"kind": "array", "count": 2, "subtype": {"kind": "struct", "name": "_LIST_ENTRY"}},
                },
                "": {"offset": 48, "anonymous": True, "type": {"kind": "union", "name": "__unnamed_1"}},
            },
        },
        "__unnamed_1": {
            "kind": "union",
            "size": 8,
            "fields": {"Inside": {"offset": 4, "type": base("unsigned long")}},
        },
    },
    "symbols": {"Zero": {"address": 0}, "PsList": {"address": 0x1234}, "PsListHead": {"address": 0x5678}},
}


@pytest.fixture
def table():
    return parse_isf(json.dumps(ISF).encode())


def test_members_are_found_by_their_path(table):
    assert table.field("_OUTER.Links.Blink") == Field(16, 8, 0, 0, 0, "*_LIST_ENTRY")
    assert table.field("_OUTER.State") == Field(24, 4, 0, 0, 0, "enum _STATE")
    assert table.field("_OUTER.Flag") == Field(28, 4, 3, 5, 0, "unsigned long")
    assert table.field("_OUTER.Name") == Field(32, 15, 0, 0, 15, "char")
    assert table.field("_OUTER.Rings.Blink") == Field(8, 8, 0, 0, 0, "*_LIST_ENTRY")
    assert table.offset("_OUTER.Inside") == 52
    assert (table.size("_OUTER"), table.pointer_size) == (64, 8)
    assert table.enum("_STATE") == {"Ready": 1, "Running": 2}
    assert set(table.members("_LIST_ENTRY")) == {"Flink", "Blink"}


def test_the_name_of_a_symbol_is_found_whole_or_not_at_all(table):
    assert [table.find(name) for name in ("Zero", "PsList", "PsListHead")] == [0, 0x1234, 0x5678]
    assert [table.find(name) for name in ("PsLis", "sList", "", "PsList\t1234", "PsListHea", "~", "\n")] == [None] * 7
    assert table.get("PsList") == 0x1234


def test_what_is_lacking_is_named(table):
    assert not table.has("_NONE")
    assert not table.has("_OUTER.Links.Nothing")
    assert not table.has("_OUTER.Flink")
    assert not table.has("_OUTER.State.Ready")
    for act, words in (
        (lambda: table.field("_OUTER.Nothing"), "_OUTER.Nothing"),
        (lambda: table.size("_NONE"), "_NONE"),
        (lambda: table.enum("_OUTER"), "enum _OUTER"),
        (lambda: table.get("PsNothing"), "PsNothing"),
    ):
        with pytest.raises(UnsupportedGuest, match=words) as raised:
            act()
        assert "ntkrnlmp.pdb/00112233445566778899AABBCCDDEEFF-2" in str(raised.value)


def test_a_table_of_ours_is_asked_as_any_other():
    table = SymbolTable.of(
        types={
            "_LIST_ENTRY": (8, {"Flink": (0, 4), "Blink": (4, 4)}),
            "_THING": (32, {"Links": (12, "_LIST_ENTRY"), "Bits": Field(20, 4, 2, 3)}),
        },
        symbols={"Head": 0x10},
        enums={"_KIND": {"One": 1}},
        pdb=PdbId("x.pdb", "0" * 32, 1),
        pointer_size=4,
    )
    assert table.field("_THING.Links.Blink") == Field(16, 4)
    assert table.field("_THING.Links").size == 8
    assert table.field("_THING.Bits") == Field(20, 4, 2, 3)
    assert (table.get("Head"), table.enum("_KIND"), table.pointer_size) == (0x10, {"One": 1}, 4)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"metadata": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**ISF, "symbols": 7}).encode(),
    ],
)
def test_what_is_no_symbol_table_is_said_to_be_none(text):
    with pytest.raises(Implausible, match="no symbol table"):
        parse_isf(text)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_a_table_holds_it_is_read_or_refused(data):
    """Any one value of the JSON is replaced by another: parsing or asking ends in a GuestError at worst."""
    whole = json.loads(json.dumps(ISF))
    place, key = whole, None
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    wrong = st.sampled_from(
        [None, -1, 1 << 80, "x", [], {}, {"kind": "array", "count": 1 << 70}, {"kind": {}}, 1.5, True]
    )
    place[key] = data.draw(wrong)
    try:
        table = parse_isf(json.dumps(whole).encode())
        for path in ("_OUTER.Links.Blink", "_OUTER.Inside", "_OUTER.Flag", "_OUTER.Name"):
            if table.has(path):
                assert 0 <= table.offset(path) < 1 << 32
        table.find("PsList")
    except GuestError:
        pass


@needs_real
@pytest.mark.parametrize("pdb", ["ntkrnlmp.pdb", "tcpip.pdb"])
def test_every_type_and_symbol_of_a_real_table_is_found(pdb):
    for path in sorted((REAL / "windows" / pdb).glob("*.json.xz"))[:1]:
        raw = lzma.decompress(path.read_bytes())
        data, table = json.loads(raw), parse_isf(raw)
        assert str(table.pdb) == f"{pdb}/{path.name.removesuffix('.json.xz')}"
        assert all(table.find(name) == entry["address"] for name, entry in data["symbols"].items())
        for name, entry in data["user_types"].items():
            assert table.size(name) == entry["size"]
            found = table.members(name)
            assert {member: where["offset"] for member, where in entry["fields"].items()} == {
                member: field.offset for member, field in found.items()
            }
        assert all(table.enum(name) == entry["constants"] for name, entry in data["enums"].items())
