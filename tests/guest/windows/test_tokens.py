"""Who a process runs as."""

import json
import random
import struct

import pytest

from appliance.errors import Implausible
from appliance.guest.windows.isf import parse_isf
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.tokens import Tokens, is_account, parse_sid, pool_sid, service_sid, well_known_name
from tests.guest.windows.machines import kernel_of, planted
from tests.worlds.windows import Machine
from tests.worlds.windows.symbols import invented
from tests.worlds.windows.xp import XpMachine


def sid_bytes(authority: int, *parts: int) -> bytes:
    return bytes([1, len(parts)]) + authority.to_bytes(6, "big") + struct.pack(f"<{len(parts)}I", *parts)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (sid_bytes(5, 18), "S-1-5-18"),
        (sid_bytes(5, 21, 1, 0xFFFFFFFF, 3, 500), "S-1-5-21-1-4294967295-3-500"),
        (sid_bytes(16, 0x4000) + b"what lies behind", "S-1-16-16384"),
        (sid_bytes(5, *range(1, 16)), "S-1-5-1-2-3-4-5-6-7-8-9-10-11-12-13-14-15"),
    ],
)
def test_a_sid_is_printed_as_windows_prints_it(raw, text):
    assert parse_sid(raw) == text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        sid_bytes(5, 18)[:-1],
        b"\2" + sid_bytes(5, 18)[1:],
        sid_bytes(5),
        bytes([1, 16]) + bytes(70),
        b"\xdd" * 68,
    ],
)
def test_bytes_that_are_no_sid_are_refused(raw):
    with pytest.raises(Implausible):
        parse_sid(raw)


def test_the_sid_of_a_service_is_the_hash_that_windows_publishes_for_trusted_installer():
    published = "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464"
    assert service_sid("trustedInstaller") == published
    assert well_known_name(published) == "NT SERVICE\\TrustedInstaller"


def test_the_sid_of_the_default_application_pool_is_the_one_that_iis_gives_it():
    published = "S-1-5-82-3006700770-424185619-1745488364-794895919-4004696415"
    assert pool_sid("DefaultAppPool") == published
    assert well_known_name(published) == "IIS APPPOOL\\DefaultAppPool"


def test_a_name_that_is_only_claimed_is_not_believed():
    assert well_known_name(service_sid("BFE"), ["Dnscache"]) is None
    assert well_known_name(service_sid("BFE"), ["Dnscache", "BFE"]) == "NT SERVICE\\BFE"
    assert well_known_name(pool_sid("shop"), ["Shop"]) == "IIS APPPOOL\\Shop"
    assert well_known_name("S-1-5-80-1-2-3-4-5", ["BFE"]) is None


@pytest.mark.parametrize(
    ("sid", "name"),
    [
        ("S-1-5-18", "NT AUTHORITY\\SYSTEM"),
        ("S-1-5-19", "NT AUTHORITY\\LOCAL SERVICE"),
        ("S-1-5-20", "NT AUTHORITY\\NETWORK SERVICE"),
        ("S-1-5-90-0-2", "Window Manager\\DWM-2"),
        ("S-1-5-96-0-11", "Font Driver Host\\UMFD-11"),
        ("S-1-5-90-0-2-1", None),
        ("S-1-5-21-1-2-3-500", None),
    ],
)
def test_well_known_accounts_have_the_names_that_windows_shows(sid, name):
    assert well_known_name(sid) == name


def test_only_accounts_of_a_domain_or_a_machine_are_asked_for_their_names():
    assert is_account("S-1-5-21-1-2-3-1001") and is_account("S-1-12-1-7")
    assert not is_account("S-1-5-18") and not is_account("S-1-5-80-1")


def test_a_token_of_random_bytes_is_no_token():
    machine = XpMachine("xp-sp3")
    kernel = kernel_of(machine)
    tokens, dice = Tokens(kernel), random.Random(1)
    size = machine.types.size("_TOKEN")
    va = machine.pool.take(b"Toke", size)
    for _ in range(300):
        pointer = dice.choice([dice.randrange(1 << 32), machine.base + dice.randrange(0x1000), va])
        machine.space.write(va, dice.randbytes(size))
        machine.space.write(va + machine.types.offset("_TOKEN.UserAndGroups"), struct.pack("<I", pointer))
        found = tokens.read([va | 3])
        assert found[0] is None or found[0].sid.startswith("S-1-")


def test_where_the_types_lack_tokens_nobody_is_named_and_all_else_is_told():
    with Machine("20348") as machine:
        document = json.loads(json.dumps(invented("20348")[0].document))
        document["user_types"]["_TOKEN"]["fields"] = {}
        del document["user_types"]["_EPROCESS"]["fields"]["Token"]
        whole = kernel_of(machine)
        types = parse_isf(json.dumps(document).encode())
        kernel = WindowsKernel(whole.space, base=whole.base, size=whole.size, types=types, shared=whole.read_shared())
        processes = Processes(kernel)
        told = processes.describe_all(processes.walk().processes)
        assert {one.pid for one in told} == {each.pid for each in planted(machine)}
        assert {one.sid for one in told} == {None}
