"""A guest whose memory lies: any page the walks touch replaced by any bytes. They end; only GuestError is raised."""

import random
import struct
import time

import pytest

from appliance.errors import GuestError
from appliance.guest.attach import attach
from appliance.guest.kernel import Kernel
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.qemu import open_qemu
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Match, Transport
from tests.system.test_sockets_equal_ss import WORKLOAD, flow_of
from tests.worlds.overlay import Overlay

pytestmark = pytest.mark.system

PAGE = 4096
WALK_S = 20.0  # far above what any walk takes on a busy machine


@pytest.fixture(scope="module")
def world(guest):
    """The overlay, a way to make an eye on it, and connections to look up."""
    guest.spawn(WORKLOAD.replace("1000", "100")).wait_for("READY", 120)
    memory = open_qemu(guest.pid)
    real = attach(memory)
    overlay = Overlay(memory)

    def look():
        return LinuxEye(
            Kernel(
                overlay,
                image=real.image,
                root=real.root,
                la57=real.la57,
                page_offset=real.page_offset,
                symbols=real.symbols,
                types=real.types,
                release=real.release,
                build_id=real.build_id,
                vmemmap_base=real.vmemmap_base,
                vmalloc_base=real.vmalloc_base,
            )
        )

    eye = look()
    sockets = eye.read_snapshot().sockets
    flows = [flow_of(socket) for socket in sockets if socket.remote and socket.protocol is not Transport.RAW]
    local = flows[0].tuple.local
    nobody = FiveTuple(Transport.TCP, Endpoint(local.ip, 1), Endpoint(local.ip, 2))
    flows.append(Flow(FlowId(GuestId("qemu:0"), 0), nobody, Direction.OUT, 0))
    for flow in flows:
        eye.find_owner(flow)
    return overlay, look, flows, sorted(overlay.touched)


def soup(pages, chance, page_offset):
    """A page of pointers to other pages that the walks read: circles, wrong types, everything linked to everything."""
    return struct.pack(
        "<512Q", *(page_offset + chance.choice(pages) * PAGE + chance.randrange(0, PAGE, 8) for _ in range(512))
    )


@pytest.mark.parametrize("seed", range(80))
def test_any_page_may_hold_any_bytes(world, seed):
    overlay, look, flows, pages = world
    chance = random.Random(seed)
    count, kind = chance.choice([1, 1, 2, 5, 40]), seed % 4
    overlay.pages.clear()
    warm = look() if chance.random() < 0.5 else None
    if warm is not None:
        warm.read_snapshot()
    for page in chance.sample(pages, min(count, len(pages))):
        filling = [bytes(PAGE), b"\xff" * PAGE, chance.randbytes(PAGE), b""][kind]
        overlay.pages[page] = filling or soup(pages, chance, 0)
    eye = warm
    began = time.monotonic()
    try:
        eye = warm or look()
        if kind == 3:
            for page in overlay.pages:
                overlay.pages[page] = soup(pages, chance, eye._kernel.page_offset)
        eye.read_snapshot()
    except GuestError:
        pass
    if eye is not None:
        for flow in chance.sample(flows, 8):
            try:
                finding = eye.find_owner(flow)
            except GuestError:
                continue
            assert finding.match in Match
    overlay.pages.clear()
    assert time.monotonic() - began < WALK_S
