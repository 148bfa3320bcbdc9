"""Does KVM work here? Proven by a guest of three instructions: /dev/kvm may be there, and what runs on it never run.

This file is also the trial itself, run in a process of its own with a time limit: a virtual CPU that never comes back
takes nobody with it. Nothing of the host is changed; the guest has one page and ends with the process.
Sources: Documentation/virt/kvm/api.rst, include/uapi/linux/kvm.h (x86-64).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import subprocess
import sys
from fcntl import ioctl
from pathlib import Path

DEVICE = "/dev/kvm"
TRIAL_S = 3.0  # it takes some milliseconds where KVM works
PORT, WORD = 0x10, 0x42
CODE = bytes((0xB0, WORD, 0xE6, PORT, 0xF4))  # mov al, WORD; out PORT, al; hlt

_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE, _CREATE_VCPU, _RUN = 0xAE00, 0xAE01, 0xAE04, 0xAE41, 0xAE80
_SET_TSS_ADDR, _SET_IDENTITY_MAP_ADDR, _SPARE = 0xAE47, 0x4008AE48, 0x1000_0000
_SET_USER_MEMORY_REGION, _SET_REGS, _GET_SREGS, _SET_SREGS = 0x4020AE46, 0x4090AE82, 0x8138AE83, 0x4138AE84
_API_VERSION, _EXIT_IO = 12, 2
_SREGS_SIZE, _SEGMENT_SIZE, _CS_AT = 312, 24, 0
_RIP, _RFLAGS = 16, 17  # of struct kvm_regs, in words of eight bytes
_EXIT_REASON_AT, _IO_AT = 8, 32  # struct kvm_run


def run_trial(device: str = DEVICE, seconds: float = TRIAL_S) -> str:
    """Run the guest; return why it did not run, "" where it did."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__)), device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a guest of three instructions did not end within {seconds:g} s"
    said = (done.stdout + done.stderr).strip().splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"the trial ended with {done.returncode}"


def run_guest(device: str) -> None:
    """Make a virtual machine, run it until it writes to a port. Raises OSError."""
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    if (version := ioctl(kvm, _GET_API_VERSION, 0)) != _API_VERSION:
        raise OSError(f"its API has version {version}, not {_API_VERSION}")
    machine = ioctl(kvm, _CREATE_VM, 0)
    with contextlib.suppress(OSError):  # Intel's older processors need room of their own to run real-mode code
        ioctl(machine, _SET_TSS_ADDR, _SPARE)
        ioctl(machine, _SET_IDENTITY_MAP_ADDR, struct.pack("=Q", _SPARE + 3 * mmap.PAGESIZE))
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[: len(CODE)] = CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ioctl(machine, _SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, mmap.PAGESIZE, address))
    cpu = ioctl(machine, _CREATE_VCPU, 0)
    state = mmap.mmap(cpu, ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0), mmap.MAP_SHARED)
    special = bytearray(ioctl(cpu, _GET_SREGS, bytes(_SREGS_SIZE)))
    struct.pack_into("=Q4xH", special, _CS_AT, 0, 0)  # the code segment begins at address 0: base, selector
    ioctl(cpu, _SET_SREGS, bytes(special))
    general = [0] * 18
    general[_RFLAGS] = 2  # bit 1 is always set
    ioctl(cpu, _SET_REGS, struct.pack("=18Q", *general))
    ioctl(cpu, _RUN, 0)
    (reason,) = struct.unpack_from("=I", state, _EXIT_REASON_AT)
    if reason != _EXIT_IO:
        raise OSError(f"the guest ended with exit reason {reason} instead of writing to its port")
    _, _, port, _, offset = struct.unpack_from("=BBHIQ", state, _IO_AT)
    if (port, state[offset]) != (PORT, WORD):
        raise OSError(f"the guest wrote {state[offset]:#x} to port {port:#x}")


if __name__ == "__main__":
    try:
        run_guest(sys.argv[1])
    except OSError as error:
        sys.exit(str(error.strerror or error))
