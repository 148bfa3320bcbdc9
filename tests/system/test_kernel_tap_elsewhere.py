"""The program of the kernel tap on other kernels than this host's: a guest plays the host."""

import io
import json
import tarfile

import pytest

from lab.guest import boot
from lab.image import build
from tests.worlds.command import ROOT

pytestmark = pytest.mark.system

LOAD = """
import json
from appliance.tap.bpf import loader
from appliance.tap.bpf.layout import Transport
told = {}
for transport in Transport:
    for programs in (loader.PROGRAMS, loader.OBSERVE):
        name = f"{transport} {' '.join(programs)}"
        try:
            loader.Loaded(1024, 1 << 16, transport=transport, programs=programs).close()
            told[name] = "loads"
        except Exception as error:
            told[name] = str(error)[-2000:]
print(json.dumps(told))
"""


def packed() -> bytes:
    """The part of the appliance that loads the program, which needs nothing but the standard library."""
    folder = "appliance/tap/bpf"
    names = [f"appliance/{name}.py" for name in ("__init__", "errors", "model", "ports", "tap/__init__")]
    names += [f"{folder}/{name}.py" for name in ("__init__", "elf", "layout", "loader", "syscalls")]
    names += [f"{folder}/{name}.bpf.o" for name in ("parasight_tap", "parasight_tap_perf")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.add(ROOT / name, name)
    return buffer.getvalue()


@pytest.mark.parametrize("image", ["debian-12-cloud", "debian-12-cloud-6.12"])
def test_every_form_of_the_program_loads_on_the_kernels_of_the_lab(image, network):
    with boot(build(image), network, name="host-01", memory_mb=512) as guest:
        guest.put("/tmp/appliance.tar", packed())
        guest.put("/tmp/load.py", LOAD.encode())
        unpacked = guest.run("mkdir /tmp/host && cd /tmp/host && tar xf /tmp/appliance.tar")
        assert unpacked.returncode == 0, unpacked.stderr
        done = guest.run("cd /tmp/host && PYTHONPATH=/tmp/host exec /usr/bin/python3 -S /tmp/load.py", timeout_s=180)
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 4
    assert set(told.values()) == {"loads"}, told
