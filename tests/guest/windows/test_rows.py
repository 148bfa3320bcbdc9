"""Every row of ours against the tables that Volatility 3 brings along, and old Windows with pointers of 4 bytes."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from appliance.guest.windows.layouts import X64, X86, Layout
from tests.guest.windows.network import THEM, US, Eye
from tests.worlds.windows import Machine
from tests.worlds.windows import net as net_of_bytes

spec = find_spec("volatility3")
TABLES = Path(spec.origin if spec and spec.origin else ".").parent / "framework/symbols/windows/netscan"
TOLD = {  # fields of ours by those of the other's tables
    "_TCP_ENDPOINT.InetAF": lambda row: row.tcp.inet_af,
    "_TCP_ENDPOINT.AddrInfo": lambda row: row.tcp.addr_info,
    "_TCP_ENDPOINT.State": lambda row: row.tcp.state,
    "_TCP_ENDPOINT.LocalPort": lambda row: row.tcp.local_port,
    "_TCP_ENDPOINT.RemotePort": lambda row: row.tcp.remote_port,
    "_TCP_ENDPOINT.Owner": lambda row: row.tcp.owner,
    "_TCP_LISTENER.InetAF": lambda row: row.listener.inet_af,
    "_TCP_LISTENER.Owner": lambda row: row.listener.owner,
    "_TCP_LISTENER.LocalAddr": lambda row: row.listener.local,
    "_TCP_LISTENER.Port": lambda row: row.listener.port,
    "_TCP_LISTENER.Next": lambda row: row.listener.next,
    "_UDP_ENDPOINT.InetAF": lambda row: row.udp.inet_af,
    "_UDP_ENDPOINT.Owner": lambda row: row.udp.owner,
    "_UDP_ENDPOINT.LocalAddr": lambda row: row.udp.local,
    "_UDP_ENDPOINT.Port": lambda row: row.udp.port,
    "_UDP_ENDPOINT.Next": lambda row: row.udp.next,
    "_INETAF.AddressFamily": lambda row: row.family,
    "_ADDRINFO.Remote": lambda row: row.remote,
    "_LOCAL_ADDRESS.pData": lambda row: row.local_data,
}
POOL = {
    "_INET_PORT_POOL.PortBitMap": lambda row: row.pool.bitmap,
    "_INET_PORT_POOL.PortAssignments": lambda row: row.pool.assignments,
    "_PORT_ASSIGNMENT.InPaBigPoolBase": lambda row: row.pool.list,
    "_PORT_ASSIGNMENT_ENTRY.Entry": lambda row: row.pool.entry,
    "_INET_COMPARTMENT_SET.InetCompartment": lambda row: row.compartments.compartment,
    "_INET_COMPARTMENT.ProtocolCompartment": lambda row: row.compartments.protocol,
    "_PROTOCOL_COMPARTMENT.PortPool": lambda row: row.compartments.pool,
}
TOLD_ROWS = [row for row in (*X64, *X86) if row.source.startswith("volatility3")]


def table_of(row: Layout) -> dict:
    return json.loads((TABLES / row.source.removeprefix("volatility3 ")).read_text())["user_types"]


@pytest.mark.parametrize("row", TOLD_ROWS, ids=lambda row: row.name)
def test_a_row_agrees_with_its_source(row):
    types = table_of(row)
    for told, ours in (TOLD | (POOL if row.pool is not None else {})).items():
        name, field = told.split(".")
        if field in types.get(name, {"fields": {}})["fields"]:
            assert ours(row) == types[name]["fields"][field]["offset"], told
    if row.pool is not None and "_PORT_ASSIGNMENT_ENTRY" in types:
        assert row.pool.stride == types["_PORT_ASSIGNMENT_ENTRY"]["size"]
    if "_PARTITION" in types:
        assert row.stride == types["_PARTITION"]["size"]


class Lent(net_of_bytes.Layout):
    """The layout of another build, as the other engine tells it, in a machine of the builds that we can make."""

    def __init__(self, row: Layout) -> None:
        self._types, self._moved = table_of(row), {}


WHOLE = [row for row in TOLD_ROWS if row.pointer == 8 and "_PARTITION" in table_of(row)]


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.name)
def test_a_machine_laid_out_as_any_build_from_windows_7_on_is_read(row, monkeypatch):
    monkeypatch.setattr(net_of_bytes, "Layout", lambda _: Lent(row))
    with Machine("17763", partitions=2) as machine:
        for number, name in enumerate(("explorer.exe", "services.exe", "lsass.exe")):
            machine.tcp(machine[name], (US, 50000 + number), (THEM, 443))
        machine.tcp(machine["lsass.exe"], ("fe80::5", 50009), ("2001:db8::1", 80), state="SYN_SENT")
        machine.listener(machine["services.exe"], (US, 135))
        machine.listener(machine.system, ("::", 445))
        machine.udp(machine["explorer.exe"], ("0.0.0.0", 5353))
        eye = Eye(machine, build=row.first)
        assert eye.rows() == {
            ("tcp", "ESTABLISHED", f"{US}:50000", f"{THEM}:443", "explorer.exe"),
            ("tcp", "ESTABLISHED", f"{US}:50001", f"{THEM}:443", "services.exe"),
            ("tcp", "ESTABLISHED", f"{US}:50002", f"{THEM}:443", "lsass.exe"),
            ("tcp", "SYN_SENT", "[fe80::5]:50009", "[2001:db8::1]:80", "lsass.exe"),
            ("tcp", "LISTEN", f"{US}:135", "-", "services.exe"),
            ("tcp", "LISTEN", "[::]:445", "-", "System"),
            ("udp", "CLOSE", "0.0.0.0:5353", "-", "explorer.exe"),
        }
        assert eye.sockets.layout.tcp.owner == row.tcp.owner
        assert (eye.sockets.layout.listener, eye.sockets.layout.udp) == (row.listener, row.udp)
        assert eye.sockets.walk().gaps == []
