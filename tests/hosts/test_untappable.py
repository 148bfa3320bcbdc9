"""What has no port on this host is named, with what to do about it."""

import json

import pytest

from appliance.hosts.arguments import parse_arguments
from appliance.hosts.untappable import HANDED, explain_handed, explain_untappable

CARD = "-device virtio-net-pci,netdev=n0"


def notes(*words: str, sys=None) -> list[str]:
    argv = ["qemu-system-x86_64", *(part for word in words for part in word.split())]
    return list(explain_untappable(parse_arguments(argv), *([sys] if sys else [])))


@pytest.mark.parametrize(
    ("netdev", "words"),
    [
        ("user,id=n0", "slirp"),
        ("vhost-user,id=n0,chardev=c0", "mirror port of that switch"),
        ("vhost-vdpa,id=n0,vhostdev=/dev/vhost-vdpa-0", "representor"),
        ("stream,id=n0,server=off,addr.type=unix,addr.path=/tmp/sw.sock", "between processes"),
        ("dgram,id=n0,local.type=inet,local.host=127.0.0.1,local.port=1", "between processes"),
        ("socket,id=n0,connect=127.0.0.1:5555", "between processes"),
        ("l2tpv3,id=n0,src=::1,dst=::1,txsession=1", "between processes"),
        ("vde,id=n0,sock=/run/vde.ctl", "between processes"),
        ("af-xdp,id=n0,ifname=eth1", "AF_XDP"),
        ("vmnet-host,id=n0", "vmnet-host network has no port"),
        ("stream,id=n0,server=off,addr.type=unix,addr.path=/tmp/passt_1.socket", "passt has no port"),
        ("passt,id=n0", "passt has no port"),
    ],
)
def test_a_network_without_a_port_is_named(netdev, words) -> None:
    (note,) = notes(f"-netdev {netdev}", CARD)
    assert note.startswith("network n0: ")
    assert words in note


def test_passt_is_known_by_its_socket_as_libvirt_starts_it() -> None:
    path = "/run/libvirt/qemu/passt/1-web-net0.socket"
    device = json.dumps({"driver": "virtio-net-pci", "netdev": "hostnet0"})
    stream = {"type": "stream", "id": "hostnet0", "addr": {"type": "unix", "path": path}, "server": False}
    ways = [
        ["-netdev", json.dumps(stream)],
        [
            "-chardev",
            f"socket,id=chr0,path={path}",
            "-netdev",
            '{"type":"vhost-user","chardev":"chr0","id":"hostnet0"}',
        ],
    ]
    for words in ways:
        (note,) = explain_untappable(parse_arguments(["qemu", *words, "-device", device]))
        assert "passt has no port" in note


def test_a_tap_or_bridge_needs_no_note() -> None:
    assert notes("-netdev tap,id=n0,ifname=tap0", CARD) == []
    assert notes("-netdev bridge,id=n0,br=br0", CARD) == []
    assert notes("-nic none") == []


def test_no_word_about_networks_is_a_user_mode_one() -> None:
    (note,) = notes("-m 64")
    assert "default user-mode network" in note


@pytest.fixture
def sys(tmp_path):
    """A host with a network card, a virtual function of it, and a graphics card."""
    for address, kind in (("0000:03:00.0", "0x020000"), ("0000:03:02.1", "0x020000"), ("0000:01:00.0", "0x030000")):
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "class").write_text(f"{kind}\n")
    (tmp_path / "bus/pci/devices/0000:03:02.1/physfn").symlink_to("../0000:03:00.0")
    return tmp_path


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("vfio-pci,host=0000:03:02.1", "virtual function of a network card (SR-IOV)"),
        ("vfio-pci,host=03:02.1", "representor"),
        ("vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:03:02.1", "SR-IOV"),
        ("vfio-pci,host=0000:03:00.0", "is a network card handed through"),
        ("vfio-pci,host=0000:09:00.0", "if it is a network card"),
        ("vfio-pci,sysfsdev=/sys/bus/mdev/devices/1234", "if it is a network card"),
        ("vfio-user-pci,socket=/tmp/x", "if it is a network card"),
        ("vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0", "vDPA"),
    ],
)
def test_a_card_handed_through_is_named(sys, device, words) -> None:
    (note,) = notes("-nodefaults", f"-device {device}", sys=sys)
    assert words in note


def test_a_device_that_is_no_network_card_is_not(sys) -> None:
    assert notes("-nodefaults", "-device vfio-pci,host=0000:01:00.0", sys=sys) == []


def handed(sys, *devices: str, words: tuple[str, ...] = ()) -> list[str]:
    argv = ["qemu-system-x86_64", "-nodefaults", *(part for word in words for part in word.split())]
    return list(explain_handed(devices, parse_arguments(argv), sys))


@pytest.fixture
def groups(sys):
    """The same host: group 7 is the virtual function, group 8 the graphics card; vfio0 is the whole card."""
    for number, address in ((7, "0000:03:02.1"), (8, "0000:01:00.0")):
        (sys / f"kernel/iommu_groups/{number}/devices/{address}").mkdir(parents=True)
    (sys / "class/vfio-dev/vfio0").mkdir(parents=True)
    (sys / "class/vfio-dev/vfio0/device").symlink_to("../../../bus/pci/devices/0000:03:00.0")
    return sys


def test_a_card_that_was_handed_through_while_the_guest_ran_is_found_by_its_device_file(groups) -> None:
    (note,) = handed(groups, "/dev/vfio/7")
    assert "vfio-pci 0000:03:02.1 is a virtual function" in note
    (note,) = handed(groups, "/dev/vfio/devices/vfio0")
    assert "vfio-pci 0000:03:00.0 is a network card handed through" in note
    (note,) = handed(groups, "/dev/vhost-vdpa-0")
    assert "/dev/vhost-vdpa-0: if it is a network card" in note


def test_what_the_command_line_names_is_not_told_twice(groups) -> None:
    assert handed(groups, "/dev/vfio/7", words=("-device vfio-pci,host=03:02.1",)) == []
    assert (
        handed(groups, "/dev/vhost-vdpa-0", words=("-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0",)) == []
    )
    words = ("-netdev vhost-vdpa,id=n0,vhostdev=/dev/vhost-vdpa-0", CARD)
    assert handed(groups, "/dev/vhost-vdpa-0", words=words) == []


def test_a_device_file_with_no_network_card_behind_it_needs_no_note(groups) -> None:
    assert handed(groups, "/dev/vfio/8", "/dev/vfio/99", "/dev/vfio/devices/vfio9") == []


def test_device_files_of_vfio_and_vdpa_are_known_by_their_names() -> None:
    names = [
        "/dev/vfio/vfio",
        "/dev/vfio/12",
        "/dev/vfio/devices/vfio3",
        "/dev/vhost-vdpa-1",
        "/dev/vhost-net",
        "/dev/kvm",
    ]
    assert [name for name in names if HANDED.fullmatch(name)] == names[1:4]
