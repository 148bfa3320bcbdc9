import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.hosts.arguments import parse_arguments

MAC = "52:54:00:aa:bb:cc"


def parse(text: str):
    return parse_arguments(["qemu-system-x86_64", *text.split()])


def test_identity_and_size_are_read() -> None:
    found = parse(
        "-name guest=web-1,debug-threads=on -uuid 8C7E0B6E-0000-4000-8000-00000000ABCD -m size=2G,slots=2 -M q35"
    )
    assert (found.name, found.uuid) == ("web-1", "8c7e0b6e-0000-4000-8000-00000000abcd")
    assert (found.memory_bytes, found.machine) == (2 << 30, "q35")


@pytest.mark.parametrize(
    ("words", "size"),
    [("", 128 << 20), ("-m 512", 512 << 20), ("-m 1.5G", 3 << 29), ("-m size=1048576k", 1 << 30), ("-m x", 128 << 20)],
)
def test_memory_sizes_have_qemus_units(words: str, size: int) -> None:
    assert parse(words).memory_bytes == size


def test_a_doubled_comma_is_a_comma() -> None:
    assert parse("-name guest=a,,b,process=x").name == "a,b"


@pytest.mark.parametrize(
    "words",
    [
        f"-netdev tap,id=n0,ifname=tap7 -device virtio-net-pci,netdev=n0,mac={MAC}",
        f"-device e1000,mac={MAC.upper()},netdev=n0 -netdev type=tap,id=n0,ifname=tap7,script=no",
        f"-nic tap,ifname=tap7,mac={MAC},model=e1000",
        f"-net nic,macaddr={MAC} -net tap,ifname=tap7",
        f"--netdev tap,id=n0,ifname=tap7 --device virtio-net-pci,netdev=n0,mac={MAC}",
    ],
)
def test_every_syntax_of_a_tap_gives_its_interface_and_mac(words: str) -> None:
    (net,) = parse(words).nets
    assert (net.kind, net.ifname, net.mac) == ("tap", "tap7", MAC)


def test_the_json_syntax_of_libvirt_is_read() -> None:
    netdev = {"type": "tap", "fd": "31", "vhost": True, "vhostfd": "33", "id": "hostnet0"}
    device = {"driver": "virtio-net-pci", "netdev": "hostnet0", "id": "net0", "mac": MAC, "bus": "pci.1"}
    (net,) = parse_arguments(["q", "-netdev", json.dumps(netdev), "-device", json.dumps(device)]).nets
    assert (net.fds, net.mac) == ((31,), MAC)


def test_cards_without_a_mac_get_qemus_default_ones() -> None:
    first = f"-netdev tap,id=a,fds=5:6 -device virtio-net-pci,netdev=a,mac={MAC}"
    rest = "-netdev tap,id=b -device e1000,netdev=b -netdev tap,id=c -device e1000,netdev=c"
    nets = parse(f"{first} {rest}").nets
    assert [net.mac for net in nets] == [MAC, "52:54:00:12:34:56", "52:54:00:12:34:57"]
    assert nets[0].fds == (5, 6)


def test_a_back_end_without_a_card_is_no_port() -> None:
    assert parse("-netdev tap,id=n0,ifname=tap7").nets == ()


def test_no_word_about_networks_means_the_default_user_mode_one() -> None:
    assert parse("-m 64").default_net
    assert not parse("-m 64 -nodefaults").default_net
    assert not parse("-nic none").default_net


def test_devices_handed_through_are_named() -> None:
    assert parse("-device vfio-pci,host=0000:03:00.0").passthrough == ("vfio-pci 0000:03:00.0",)


def test_a_monitor_is_offered_only_where_no_manager_owns_it() -> None:
    ours = "-qmp unix:/tmp/a.sock,server=on,wait=off -chardev socket,id=m,path=/tmp/b.sock,server,nowait"
    assert parse(f"{ours} -mon chardev=m,mode=control").monitors == ("/tmp/a.sock", "/tmp/b.sock")
    libvirts = "-chardev socket,id=charmonitor,fd=24,server=on,wait=off -mon chardev=charmonitor,mode=control"
    old = "-chardev socket,id=charmonitor,path=/var/lib/libvirt/qemu/domain-1-web/monitor.sock,server,nowait"
    assert parse(libvirts).monitors == ()
    assert parse(f"{old} -mon chardev=charmonitor,mode=control").monitors == ()
    assert parse("-qmp unix:/tmp/a.sock -chardev socket,id=m,path=/tmp/h,server=on -mon chardev=m").monitors == ()


def test_the_life_of_a_domain_is_read_from_the_key_that_libvirt_hands_over() -> None:
    key = {"qom-type": "secret", "id": "masterKey0", "file": "/var/lib/libvirt/qemu/domain-12-web-1/master-key.aes"}
    assert parse_arguments(["q", "-object", json.dumps(key)]).libvirt_id == 12
    assert parse("-object secret,id=masterKey0,format=raw,file=/l/domain-3-a/master-key.aes").libvirt_id == 3
    assert parse("-object secret,id=mine,file=/l/domain-3-a/master-key.aes").libvirt_id is None
    assert parse("-name domain-3-a").libvirt_id is None


def test_what_takes_over_a_state_and_what_serves_xen_is_told() -> None:
    assert parse("-incoming defer").incoming
    assert not parse("-S").incoming
    assert parse("-xen-domid 7 -machine xenfv").xen_domid == 7
    assert parse("-m 64").xen_domid is None


words = st.text(alphabet='-abdeimnotv=,:{}"[]0123456789.', max_size=40)
options = st.sampled_from(["-netdev", "-device", "-nic", "-net", "-name", "-m", "-uuid", "-M"])


@settings(deadline=None)
@given(st.lists(options | words, max_size=12))
def test_any_words_are_read_without_an_exception(argv: list[str]) -> None:
    parse_arguments(["qemu", *argv])
    parse_arguments(argv)


def test_a_name_that_looks_like_an_option_is_a_name() -> None:
    uuid = "99999999-2222-3333-4444-555555555555"
    found = parse_arguments(["qemu-system-x86_64", "-S", "-name", "-uuid", "-uuid", uuid, "-m", "64"])
    assert (found.name, found.uuid, found.memory_bytes) == ("-uuid", uuid, 64 << 20)
