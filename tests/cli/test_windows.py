"""What a person sees of a Windows guest: an image of a machine made of bytes, opened by the commands."""

import json
import shutil
import sys

import pytest
from rich.console import Console
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap
from typer.testing import CliRunner

from appliance.cli.main import app
from tests.worlds.windows import Machine
from tests.worlds.windows.scene import plant

HOME, PEER = "10.0.0.5", "203.0.113.9"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with symbols, an image with everything odd in it, and one with nothing odd."""
    folder = tmp_path_factory.mktemp("windows")
    with Machine("20348") as machine:
        machine.write_symbols(folder)
        plant(machine)
        machine.write_elf(folder / "odd.elf")
    with Machine("20348") as machine:
        machine.tcp(machine["explorer.exe"], (HOME, 50000), (PEER, 443))
        machine.write_elf(folder / "plain.elf")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command that finds nothing of ours but what it is told of."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("PARASIGHT_SYMBOLS", "PARASIGHT_SYMBOL_SHARE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_connections_of_an_image_are_told_with_owner_user_and_flags(run, places):
    done = run("connections", f"file:{places / 'odd.elf'}", "--symbols", places, "-o", "json")
    rows = {(row["protocol"], row["local"]["port"]): row for row in json.loads(done.stdout)}
    assert done.exit_code == 0
    assert {port: row["flags"] for (_, port), row in rows.items() if row["flags"]} == {
        49720: ["unlinked-endpoint"],
        49721: ["one-table-only"],
        49722: ["one-table-only"],
        49730: ["hidden-process"],
        49731: ["owner-exited"],
        49741: ["stale"],
    }
    usual = rows["tcp", 49701]
    assert (usual["state"], usual["remote"], usual["netns"]) == ("ESTABLISHED", {"ip": "93.184.216.34", "port": 443}, 1)
    (owner,) = usual["owners"]
    assert (owner["name"], owner["path"]) == ("browser.exe", "C:\\Program Files\\Browser\\browser.exe")
    assert (owner["sid"][:9], owner["session"], owner["uid"], owner["flags"]) == ("S-1-5-21-", 1, None, [])


def test_processes_of_an_image_are_told_with_session_service_and_flags(run, places):
    done = run("processes", f"file:{places / 'odd.elf'}", "--symbols", places, "-o", "json")
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows if "hidden-process" in row["flags"]] == ["hidden.exe"]
    assert ["Dnscache"] in [row["services"] for row in rows]
    assert {row["session"] for row in rows} >= {0, 1}


def test_flags_have_a_column_only_where_there_are_any(run, places):
    odd = run("connections", f"file:{places / 'odd.elf'}", "--symbols", places).stdout
    plain = run("connections", f"file:{places / 'plain.elf'}", "--symbols", places).stdout
    assert "FLAGS" in odd and "unlinked-endpoint" in odd
    assert "FLAGS" not in plain and "explorer.exe" in plain
    assert "NETNS" not in plain
    assert "SESSION" in run("processes", f"file:{places / 'plain.elf'}", "--symbols", places).stdout


def test_symbols_that_were_found_once_are_remembered(run, places):
    first = run("connections", f"file:{places / 'plain.elf'}", "--symbols", places, "-o", "jsonl")
    again = run("connections", f"file:{places / 'plain.elf'}", "-o", "jsonl")
    assert (again.exit_code, again.stdout) == (0, first.stdout)


def test_where_symbols_are_lacking_the_error_is_the_command_that_gets_them(run, places):
    done = run("connections", f"file:{places / 'plain.elf'}")
    message = str(done.exception)
    assert done.exit_code != 0
    assert "pdbconv -p ntkrnlmp.pdb -g" in message
    assert "--symbols" in message


def test_without_the_symbols_of_tcpip_processes_are_told_and_connections_are_refused(run, places, tmp_path):
    shutil.copytree(places / "windows" / "ntkrnlmp.pdb", tmp_path / "windows" / "ntkrnlmp.pdb")
    processes = run("processes", f"file:{places / 'odd.elf'}", "--symbols", tmp_path, "-o", "json")
    assert (processes.exit_code, "hidden.exe" in processes.stdout) == (0, True)
    connections = run("connections", f"file:{places / 'odd.elf'}", "--symbols", tmp_path, "-o", "json")
    assert (connections.exit_code, json.loads(connections.stdout)) == (6, [])
    assert "not seen: connections and sockets: no symbols for tcpip.pdb" in connections.stderr


def test_an_image_that_is_cut_short_is_told_as_far_as_it_goes_and_says_so(run, places, tmp_path):
    whole = (places / "odd.elf").read_bytes()
    (tmp_path / "short.elf").write_bytes(whole[: len(whole) // 2])
    done = run("processes", f"file:{tmp_path / 'short.elf'}", "--symbols", places)
    assert (done.exit_code, "explorer.exe" in done.stdout) == (0, True)
    assert "not seen: memory image: the file is cut short" in done.stderr


def test_a_folder_of_symbols_that_is_not_there_is_a_mistake_of_the_command_line(run, places, tmp_path):
    done = run("processes", f"file:{places / 'odd.elf'}", "--symbols", tmp_path / "symbosl")
    assert (done.exit_code, "does not exist" in done.stderr) == (2, True)


def test_where_room_is_short_paths_fold_and_addresses_do_not(run, places, monkeypatch):
    monkeypatch.setattr("appliance.cli.render.console", lambda: Console(file=sys.stdout, width=120))
    shown = run("connections", f"file:{places / 'odd.elf'}", "--symbols", places).stdout
    assert max(map(len, shown.splitlines())) <= 120
    for whole in ("198.51.100.20:443", "[2001:db8::5]:443", "browser.exe[328]", "unlinked-endpoint"):
        assert whole in shown


def test_an_image_of_neither_system_is_said_to_be_neither(run, tmp_path):
    (tmp_path / "empty.raw").write_bytes(bytes(4 << 20))
    message = str(run("connections", f"file:{tmp_path / 'empty.raw'}").exception)
    assert "Linux" in message and "Windows" in message


def conversation(local_port, peer, peer_port):
    """A TCP connection that the guest begins, and that lives on for three seconds."""
    out = IP(src=HOME, dst=peer), {"sport": local_port, "dport": peer_port}
    back = IP(src=peer, dst=HOME), {"sport": peer_port, "dport": local_port}
    steps = [(0.0, out, "S"), (0.001, back, "SA"), (0.002, out, "A")]
    steps += [(0.003 + number / 4, (out, back)[number % 2], "PA") for number in range(12)]
    for at, (ip, ports), flags in steps:
        packet = Ether() / ip / TCP(**ports, flags=flags) / (b"x" * 20 if "P" in flags else b"")
        packet.time = 1_780_315_200 + at
        yield packet


def test_a_recorded_capture_is_judged_by_the_image_and_what_the_guest_conceals_is_an_alert(run, places, tmp_path):
    wanted = {49701: "93.184.216.34", 49720: "203.0.113.99", 49730: "203.0.113.98"}
    ports = {49701: 443, 49720: 1337, 49730: 4444}
    packets = [packet for port, peer in wanted.items() for packet in conversation(port, peer, ports[port])]
    wrpcap(str(tmp_path / "guest.pcap"), sorted(packets, key=lambda packet: packet.time))
    done = run(
        "replay", "--pcap", tmp_path / "guest.pcap", "--memory", places / "odd.elf", "--symbols", places,
        "--local", HOME, "-o", "jsonl",
    )  # fmt: skip
    verdicts = {one["flow"]["local"]["port"]: one for one in map(json.loads, done.stdout.splitlines()) if "flow" in one}
    names = {port: one["process"] and one["process"]["name"] for port, one in verdicts.items()}
    assert names == {49701: "browser.exe", 49720: "notepad.exe", 49730: "hidden.exe"}
    reasons = {port: one["binding"]["reason"] for port, one in verdicts.items()}
    assert reasons == {49701: None, 49720: None, 49730: "hidden"}
    assert "the guest's own tables do not have this connection" in verdicts[49720]["because"]
    assert "unlinked-endpoint" in {item["kind"] for item in verdicts[49720]["evidence"]}
    assert "is not on the guest's own list of processes" in verdicts[49730]["because"]
    for port in (49720, 49730):
        assert (verdicts[port]["alert"], verdicts[port]["severity"] in ("high", "critical")) == (True, True)
    assert verdicts[49701]["alert"] is False
