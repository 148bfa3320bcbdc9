"""What bytes and paths of a process are told to be: images without headers, shellcode, detours, odd places."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.guest.windows.injection_bytes import (
    Jump,
    decode_jump,
    find_image,
    find_shellcode,
    is_call,
    is_relocated,
    looks_wiped,
    parse_header,
    runs_of,
)
from appliance.guest.windows.injection_paths import compare, find_runtime, odd_place, parse_place

PAGE = 4096
VA = 0x7FF6_1234_0000


def header(
    *, bits: int = 64, sections: tuple[tuple[bytes, int, int, int], ...] = ((b".text", 0x1000, 0x800, 0x60000020),)
) -> bytes:
    """A PE header as a compiler makes one, in its first page."""
    optional = 240 if bits == 64 else 224
    raw = bytearray(PAGE)
    raw[:2], raw[0x3C:0x40] = b"MZ", struct.pack("<I", 0x80)
    raw[0x4E:0x74] = b"This program cannot be run in DOS mode"
    machine = 0x8664 if bits == 64 else 0x14C
    raw[0x80:0x98] = b"PE\0\0" + struct.pack("<HHIIIHH", machine, len(sections), 0x5F000000, 0, 0, optional, 0x22)
    body = bytearray(optional)
    body[:2] = struct.pack("<H", 0x20B if bits == 64 else 0x10B)
    body[16:20], body[56:64] = struct.pack("<I", 0x1234), struct.pack("<II", 0x5000, 0x400)
    body[24:32] = struct.pack("<Q", VA) if bits == 64 else struct.pack("<II", 0, 0x400000)
    at = 112 if bits == 64 else 96
    body[at + 8 * 12 : at + 8 * 12 + 8] = struct.pack("<II", 0x1000, 0x40)
    raw[0x98 : 0x98 + optional] = body
    for number, (name, start, size, flags) in enumerate(sections):
        at = 0x98 + optional + 40 * number
        raw[at : at + 40] = struct.pack("<8sIIIIIIHHI", name, size, start, size, 0x400, 0, 0, 0, 0, flags)
    return bytes(raw)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_header_in_memory_tells_its_machine_entry_sections_and_import_table(bits: int) -> None:
    sections = ((b".text", 0x1000, 0x800, 0x60000020), (b"UPX0", 0x2000, 0x1000, 0xE0000020))
    found = parse_header(header(bits=bits, sections=sections))
    assert found is not None
    assert (found.bits, found.entry, found.size, found.imports) == (bits, 0x1234, 0x5000, ((0x1000, 0x1040),))
    assert [(part.name, part.start, part.executable, part.writable) for part in found.sections] == [
        (".text", 0x1000, True, False),
        ("UPX0", 0x2000, True, True),
    ]


def test_an_image_is_told_by_what_is_left_of_its_header() -> None:
    whole = header(sections=((b".text", 0x1000, 0x800, 0x60000020), (b".rdata", 0x2000, 0x800, 0x40000040)))
    assert find_image(whole) == "an image"
    assert find_image(b"\0\0" + whole[2:]) == "an image without its MZ"
    assert find_image(bytes(0x40) + whole[0x40:0x80] + bytes(PAGE - 0x80)) == "the DOS stub of an image"
    table = bytes(0x180) + whole[0x180:]
    assert find_image(table) == "the section table of an image whose header was wiped"
    assert find_image(b"MZ".ljust(PAGE, b"\x90")) is None
    assert find_image(bytes(PAGE)) is None


def test_compiled_code_behind_a_blank_page_is_an_image_whose_header_was_wiped() -> None:
    code = b"\x48\x89\x5c\x24\x08\x48\x83\xec\x20\xcc\xcc\xcc\xcc\x40\x53\x48\x83\xec\x20".ljust(PAGE, b"\xc3")
    assert looks_wiped(bytes(PAGE), code)
    assert looks_wiped(None, code)
    assert not looks_wiped(b"\x90" * PAGE, code)
    assert not looks_wiped(bytes(PAGE), bytes(PAGE))
    assert not looks_wiped(bytes(PAGE), None)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (bytes.fromhex("65488b042560000000"), "PEB"),  # mov rax, gs:[60h]
        (bytes.fromhex("65488b5260"), "PEB"),  # mov rdx, gs:[rdx+60h]
        (bytes.fromhex("64a130000000"), "PEB"),  # mov eax, fs:[30h]
        (bytes.fromhex("648b5030"), "PEB"),  # mov edx, fs:[eax+30h]
        (bytes.fromhex("fc4883e4f0e8c0000000"), "Metasploit"),
        (bytes.fromhex("fce88200000060"), "Metasploit"),
        (bytes.fromhex("e8000000005b"), "own address"),
        (bytes.fromhex("d97424f45b"), "own address"),
        (bytes.fromhex("4c8bd1b8180000000f05c3"), "past ntdll"),
    ],
)
def test_shellcode_is_told_by_what_compilers_do_not_do(code: bytes, why: str) -> None:
    found = find_shellcode(b"\x90" * 100 + code + b"\x90" * 100)
    assert found is not None
    assert found[0] == 100
    assert why in found[1]


def test_ordinary_code_is_no_shellcode() -> None:
    prologue = bytes.fromhex("48895c2408574883ec20488bf9e8123456004885c07405e9aabbccdd654c8b0425580000004883c4205fc3")
    assert find_shellcode(prologue * 90) is None


@pytest.mark.parametrize(
    ("code", "bits", "jump"),
    [
        ("e900010000", 64, Jump(VA + 0x105)),
        ("eb10", 64, Jump(VA + 0x12)),
        ("ff2500000000", 64, Jump(VA + 6, True)),
        ("48ff2502000000", 64, Jump(VA + 9, True)),
        ("48b8efbeaddefeca0000ffe0", 64, Jump(0xCAFEDEADBEEF)),
        ("48b8efbeaddefeca000050c3", 64, Jump(0xCAFEDEADBEEF)),
        ("49bbefbeaddefeca000041ffe3", 64, Jump(0xCAFEDEADBEEF)),
        ("68efbeaddec7442404feca0000c3", 64, Jump(0xCAFEDEADBEEF)),
        ("5048b8efbeaddefeca000048870424c3", 64, Jump(0xCAFEDEADBEEF)),
        ("68efbeaddec3", 32, Jump(0xDEADBEEF)),
        ("b8efbeaddeffe0", 32, Jump(0xDEADBEEF)),
        ("ff25efbeadde", 32, Jump(0xDEADBEEF, True)),
        ("4883ec28", 64, None),
        ("e9", 64, None),
    ],
)
def test_a_detour_is_read_in_each_of_its_usual_forms(code: str, bits: int, jump: Jump | None) -> None:
    assert decode_jump(bytes.fromhex(code), VA, bits) == jump


def test_addresses_moved_by_the_loader_are_no_change_and_one_other_byte_is() -> None:
    delta = 0x7FF6_0000_0000 - 0x1_8000_0000
    before = bytearray(bytes(64))
    before[8:16], before[24:32] = struct.pack("<Q", 0x1_8000_1000), struct.pack("<Q", 0x1_8000_2345)
    after = bytearray(before)
    after[8:16], after[24:32] = struct.pack("<Q", 0x1_8000_1000 + delta), struct.pack("<Q", 0x1_8000_2345 + delta)

    def differing(raw: bytearray) -> list[int]:
        return [at for at in range(64) if before[at] != raw[at]]

    assert is_relocated(bytes(before), bytes(after), differing(after), delta)
    after[40] = 0xCC
    assert not is_relocated(bytes(before), bytes(after), differing(after), delta)
    assert not is_relocated(bytes(before), bytes(before), [], 0)


def test_differences_near_each_other_are_one_change() -> None:
    assert runs_of([1, 2, 3, 9, 40, 41]) == [(1, 10), (40, 42)]


@given(st.binary(max_size=PAGE), st.sampled_from([32, 64]))
def test_no_bytes_make_the_readers_fail(raw: bytes, bits: int) -> None:
    for start in (b"", b"MZ"):
        parse_header(start + raw)
        find_image(start + raw)
    find_shellcode(raw)
    looks_wiped(raw, raw)
    decode_jump(raw, VA, bits)


def test_a_return_address_lies_behind_a_call() -> None:
    assert is_call(bytes.fromhex("9090e811223344"))
    assert is_call(bytes.fromhex("90909090 90ffd0"))
    assert not is_call(bytes(7))


@pytest.mark.parametrize(
    ("path", "volume", "rest"),
    [
        (r"\Device\HarddiskVolume3\Windows\a.dll", r"\device\harddiskvolume3", r"\windows\a.dll"),
        (r"C:\Windows\A.dll", "c:", r"\windows\a.dll"),
        (r"\??\C:\Windows\a.dll", "c:", r"\windows\a.dll"),
        (r"\SystemRoot\System32\smss.exe", "", r"\windows\system32\smss.exe"),
        (r"\Windows\a.dll", "", r"\windows\a.dll"),
        (r"\\server\share\a.dll", "unc", r"\server\share\a.dll"),
        (r"\??\UNC\server\share\a.dll", "unc", r"\server\share\a.dll"),
        (r"\Device\Mup\server\share\a.dll", "unc", r"\server\share\a.dll"),
        (r"\Device\LanmanRedirector\;Z:000\server\share\a.dll", "unc", r"\server\share\a.dll"),
        ("", "", "\\"),
    ],
)
def test_every_notation_of_a_path_comes_apart(path: str, volume: str, rest: str) -> None:
    place = parse_place(path)
    assert (place.volume, place.rest) == (volume, rest)


@pytest.mark.parametrize(
    ("kernel", "own", "result"),
    [
        (r"\Device\HarddiskVolume3\Windows\System32\svchost.exe", r"C:\WINDOWS\system32\svchost.exe", "same"),
        (r"\Device\HarddiskVolume3\Windows\System32\smss.exe", r"\SystemRoot\System32\smss.exe", "same"),
        (r"\Device\HarddiskVolume3\Windows\SysWOW64\cmd.exe", r"C:\Windows\System32\cmd.exe", "same"),
        (r"\Device\HarddiskVolume3\Program Files\A B\program.exe", r"C:\PROGRA~1\AB\PROGRA~1.EXE", "same"),
        (r"\Device\HarddiskVolume3\Users\a\evil.exe", r"C:\Windows\System32\svchost.exe", "name"),
        (r"\Device\HarddiskVolume3\Users\a\svchost.exe", r"C:\Windows\System32\svchost.exe", "folder"),
    ],
)
def test_two_notations_are_compared_as_windows_would(kernel: str, own: str, result: str) -> None:
    assert compare(parse_place(kernel), parse_place(own)) == result


@pytest.mark.parametrize(
    ("path", "user", "system"),
    [
        (r"C:\Windows\System32\ntdll.dll", 0, 0),
        (r"C:\Program Files\Vendor\a.dll", 0, 0),
        (r"C:\ProgramData\Microsoft\Windows Defender\Platform\4.18\MpSvc.dll", 0, 0),
        (r"C:\Users\a\AppData\Local\Vendor\a.dll", 0, 2),
        (r"C:\Users\Public\a.dll", 1, 2),
        (r"C:\Windows\Temp\a.dll", 1, 2),
        (r"C:\Users\a\AppData\Local\Temp\a.dll", 1, 2),
        (r"C:\Users\a\Downloads\setup.exe", 1, 2),
        (r"C:\ProgramData\a.dll", 1, 2),
        (r"C:\$Recycle.Bin\S-1-5-21-1\a.dll", 1, 2),
        (r"\\server\share\a.dll", 1, 2),
        (r"C:\Windows\System32\a.txt:hidden.dll", 2, 2),
        (r"C:\Documents and Settings\a\Local Settings\Temp\a.dll", 1, 2),
    ],
)
def test_code_from_where_users_write_is_unusual_and_suspicious_in_a_process_of_the_system(
    path: str, user: int, system: int
) -> None:
    program = parse_place(r"C:\Windows\System32\svchost.exe")
    for weight, flag in ((user, False), (system, True)):
        found = odd_place(parse_place(path), program, system=flag)
        assert (found[0] if found else 0) == weight


def test_runtimes_are_known_by_the_images_that_they_map() -> None:
    assert find_runtime({"ntdll.dll", "coreclr.dll"}) == ".NET"
    assert find_runtime({"ntdll.dll", "jvm.dll"}) == "the Java virtual machine"
    assert find_runtime({"ntdll.dll", "chrome.exe"}) == "V8"
    assert find_runtime({"ntdll.dll", "kernel32.dll", "notclr.dll"}) is None
