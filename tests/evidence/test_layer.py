"""Guest memory as a layer of Volatility, where some of its pages cannot be read."""

import random

import pytest

from appliance.model import Gap, Region
from tests.worlds.tiny import ByteMemory

pytest.importorskip("volatility3")

from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import scanners

from plugins.parasight.layer import GuestLayer, _GuestFile, share_memory

PAGE = 4096
HOLES = (3, 700, 701)
WORD = b"needle in a hay stack"


class Ballooned(ByteMemory):
    """Says what of it cannot be read, and where nothing is at all."""

    gaps = (Gap("guest memory", 3 * PAGE, "ballooned"),)

    def data_regions(self):
        return (Region(0, 900 * PAGE), Region(950 * PAGE, 74 * PAGE))


@pytest.fixture
def memory():
    made = Ballooned(random.Random(1).randbytes(1024 * PAGE), HOLES)
    for page in (2, 699, 702, 1023):
        made.data[page * PAGE + 9 : page * PAGE + 9 + len(WORD)] = WORD
    return made


@pytest.fixture
def layer(memory):
    context = contexts.Context()
    context.config["guest.location"] = share_memory(memory)
    made = GuestLayer(context, "guest", "guest")
    context.add_layer(made)
    return made


def test_a_scan_loses_the_pages_that_are_missing_and_no_others(layer):
    found = list(layer.scan(layer.context, scanners.BytesScanner(WORD)))
    assert found == [page * PAGE + 9 for page in (2, 699, 702, 1023)]


def test_what_is_padded_is_zero_only_where_nothing_can_be_read(memory, layer):
    expected = bytearray(memory.data)
    for page in HOLES:
        expected[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    for offset, size in ((0, 1024 * PAGE), (2 * PAGE + 5, 2 * PAGE), (3 * PAGE + 7, 9), (699 * PAGE - 1, 3 * PAGE + 7)):
        assert layer.read(offset, size, pad=True) == expected[offset : offset + size]
    assert layer.read(1023 * PAGE, 2 * PAGE, pad=True) == memory.data[1023 * PAGE :] + bytes(PAGE)
    assert _GuestFile(memory).read() == expected
    with pytest.raises(exceptions.InvalidAddressException):
        layer.read(2 * PAGE, 2 * PAGE)
