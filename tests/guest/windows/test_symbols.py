"""Where symbol tables come from, in which order, and what is said when they cannot be had."""

import http.server
import json
import lzma
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.errors import UnsupportedGuest
from appliance.guest.windows import cache, symbols
from appliance.guest.windows.isf import PdbId
from appliance.guest.windows.symbols import SymbolStore
from tests.guest.windows.test_isf import ISF

PDB = PdbId("ntkrnlmp.pdb", "00112233445566778899AABBCCDDEEFF", 2)
NAME = f"{PDB.guid}-{PDB.age}.json"


def text(value=0x1234):
    """A table whose symbol PsList lies there."""
    return json.dumps(ISF | {"symbols": {"PsList": {"address": value}}}).encode()


def put(folder, data, name=NAME, pdb="ntkrnlmp.pdb"):
    place = folder / pdb
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    return folder


@contextmanager
def serve(answers, asked=None):
    """An HTTP server: for each path a status and a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if asked is not None:
                asked.append(self.path)
            status, body, headers = answers.get(self.path, (404, b"", {}))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("below", ["windows", "."])
@pytest.mark.parametrize("name", [NAME, NAME + ".xz", NAME.lower(), NAME.lower() + ".xz"])
def test_a_table_is_found_in_a_folder_whatever_the_case_of_its_guid(tmp_path, below, name):
    put(tmp_path / below, text(), name)
    found = SymbolStore([tmp_path / "nothing", tmp_path]).find(PdbId("NTKRNLMP.PDB", PDB.guid.lower(), 2))
    assert found.get("PsList") == 0x1234
    assert found.pdb == PDB


def test_the_first_folder_wins_and_a_damaged_file_is_passed_over(tmp_path):
    put(tmp_path / "bad/windows", b"{")
    put(tmp_path / "one/windows", text(1))
    put(tmp_path / "two/windows", text(2))
    assert SymbolStore([tmp_path / "bad", tmp_path / "one", tmp_path / "two"]).find(PDB).get("PsList") == 1


def test_what_was_read_once_is_remembered_and_needs_its_source_no_more(tmp_path):
    folder, remembered = put(tmp_path / "f/windows", text()), tmp_path / "cache"
    assert SymbolStore([folder.parent], remembered).find(PDB).get("PsList") == 0x1234
    found = SymbolStore([], remembered).find(PDB)
    assert (found.get("PsList"), found.pdb, found.offset("_OUTER.Inside")) == (0x1234, PDB, 52)


def test_a_source_that_changed_is_read_again(tmp_path):
    folder, remembered = put(tmp_path / "f/windows", text()), tmp_path / "cache"
    store = SymbolStore([folder.parent], remembered)
    assert store.find(PDB).get("PsList") == 0x1234
    put(folder, text(0x9999))
    assert store.find(PDB).get("PsList") == 0x9999
    assert SymbolStore([], remembered).find(PDB).get("PsList") == 0x9999


def test_what_others_may_write_is_not_believed(tmp_path):
    folder, remembered = put(tmp_path / "f/windows", text()), tmp_path / "cache"
    SymbolStore([folder.parent], remembered).find(PDB)
    file = next(remembered.iterdir())
    file.chmod(0o666)
    assert cache.load(remembered, PDB) is None
    file.chmod(0o600)
    assert cache.load(remembered, PDB) is not None
    remembered.chmod(0o777)
    assert cache.load(remembered, PDB) is None


@pytest.mark.parametrize("at", [0, 25, 60, -1])
def test_a_remembered_table_with_a_changed_byte_is_not_used(tmp_path, at):
    put(tmp_path / "f/windows", text())
    SymbolStore([tmp_path / "f"], tmp_path / "cache").find(PDB)
    file = next((tmp_path / "cache").iterdir())
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert cache.load(tmp_path / "cache", PDB) is None
    file.write_bytes(bytes(data[: len(data) // 2]))
    assert cache.load(tmp_path / "cache", PDB) is None


def test_the_cache_keeps_a_bounded_number_of_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_FILES", 3)
    for age in range(1, 6):
        isf = json.loads(text())
        isf["metadata"]["windows"]["pdb"]["age"] = age
        put(tmp_path / "f/windows", json.dumps(isf).encode(), f"{PDB.guid}-{age}.json")
        SymbolStore([tmp_path / "f"], tmp_path / "cache").find(PDB._replace(age=age))
        os.utime(tmp_path / "cache" / f"{PDB.name}.{PDB.guid}-{age}", (age, age))
    assert sorted(path.name[-1] for path in (tmp_path / "cache").iterdir()) == ["3", "4", "5"]


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    put(tmp_path / "f/windows", text())
    (tmp_path / "cache").write_text("a file")
    assert SymbolStore([tmp_path / "f"], tmp_path / "cache").find(PDB).get("PsList") == 0x1234


def test_a_table_of_another_build_under_this_name_is_refused(tmp_path):
    put(tmp_path / "windows", text(), f"{'A' * 32}-2.json")
    with pytest.raises(UnsupportedGuest, match="holds the symbols of ntkrnlmp"):
        SymbolStore([tmp_path]).find(PDB._replace(guid="A" * 32))


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_the_share_of_a_fleet_is_asked_over_http(tmp_path, suffix):
    body = lzma.compress(text()) if suffix else text()
    with serve({f"/s/windows/{PDB.name}/{NAME}{suffix}": (200, body, {})}) as url:
        assert SymbolStore([], tmp_path / "cache", url + "/s").find(PDB).get("PsList") == 0x1234
    assert SymbolStore([], tmp_path / "cache").find(PDB).get("PsList") == 0x1234


def test_the_share_may_be_a_path(tmp_path):
    put(tmp_path / "share/windows", text(), NAME + ".xz")
    assert SymbolStore(share=str(tmp_path / "share")).find(PDB).get("PsList") == 0x1234
    assert SymbolStore(share=(tmp_path / "share").as_uri()).find(PDB).get("PsList") == 0x1234


def test_a_share_that_has_nothing_is_not_asked_for_it_again_at_once():
    asked, now = [], [0.0]
    with serve({}, asked) as url:
        store = SymbolStore(share=url, clock=lambda: now[0])
        for seconds in (0, 1, symbols.RETRY_S - 1, symbols.RETRY_S + 1):
            now[0] = seconds
            with pytest.raises(UnsupportedGuest):
                store.find(PDB)
    assert len(asked) == 4  # twice two suffixes


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, b"", {}), "cannot be asked"),
        ((200, b"no json", {}), "cannot be used"),
        ((200, b"\xfd7zXZ\0broken", {}), "cannot be used"),
        ((302, b"", {"Location": "file:///etc/passwd"}), "cannot be asked"),
        ((302, b"", {"Location": "ftp://127.0.0.1/x"}), "cannot be asked"),
    ],
)
def test_a_share_that_answers_wrongly_is_told_beside_the_command(answer, words):
    with (
        serve({f"/windows/{PDB.name}/{NAME}.xz": answer}) as url,
        pytest.raises(UnsupportedGuest, match=words) as raised,
    ):
        SymbolStore(share=url).find(PDB)
    assert "pdbconv" in str(raised.value)


def test_an_answer_that_is_too_large_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(symbols, "MAX_FILE", 1000)
    path = f"/windows/{PDB.name}/{NAME}.xz"
    with serve({path: (200, bytes(100_000), {})}) as url, pytest.raises(UnsupportedGuest, match="too large"):
        SymbolStore(share=url).find(PDB)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(symbols, "MAX_JSON", 1 << 20)
    monkeypatch.setattr("appliance.guest.windows.isf.MAX_JSON", 1 << 20)
    put(tmp_path / "windows", b" " * (8 << 20), NAME + ".xz")
    with pytest.raises(UnsupportedGuest, match="too large"):
        SymbolStore([tmp_path]).find(PDB)


@pytest.mark.parametrize(
    "pdb",
    [
        PdbId("../../etc/passwd", PDB.guid, 1),
        PdbId("a/b.pdb", PDB.guid, 1),
        PdbId("ntkrnlmp.pdb", "../" * 8, 1),
        PdbId("ntkrnlmp.pdb", PDB.guid, -1),
        PdbId("ntkrnlmp.pdb", PDB.guid, 1 << 31),
        PdbId("x" * 200 + ".pdb", PDB.guid, 1),
        PdbId("nt\n.pdb", PDB.guid, 1),
    ],
)
def test_what_a_guest_says_of_its_symbols_never_becomes_a_path_unchecked(pdb, tmp_path):
    asked = []
    with serve({}, asked) as url, pytest.raises(UnsupportedGuest, match="that cannot be"):
        SymbolStore([tmp_path], tmp_path / "cache", url).find(pdb)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_folders_and_the_share(tmp_path, monkeypatch):
    put(tmp_path / "two/windows", text())
    monkeypatch.setenv("PARASIGHT_SYMBOLS", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    monkeypatch.setenv("PARASIGHT_SYMBOL_SHARE", "/some/share")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    store = SymbolStore.default([Path("/given")])
    named = [Path("/given"), tmp_path / "one", tmp_path / "two", tmp_path / "data/parasight/symbols"]
    assert list(store.dirs) == named
    assert store.share == "/some/share"
    assert store.find(PDB).get("PsList") == 0x1234
    assert (tmp_path / "cache/parasight/symbols").stat().st_mode & 0o777 == 0o700
