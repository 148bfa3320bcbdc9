"""What libvirt's XML says, as text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.hosts.domainxml import NAMESPACE, parse_domain
from appliance.hosts.unreadable import explain_unreadable
from appliance.hosts.untappable import explain_untappable

PCI = "<source><address domain='0x0000' bus='0x3b' slot='0x02' function='0x1'/></source>"


def domain(devices: str = "", metadata: str = "", more: str = "") -> str:
    return f"""<domain type='kvm' id='7'>
      <name>web-1</name><uuid>3D1F3C6A-5b5e-4c7a-9d53-0f3a5b6c7d8e</uuid>
      <metadata>{metadata}</metadata><memory unit='KiB'>2097152</memory>
      <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>{more}<devices>{devices}</devices></domain>"""


def marked(text: str) -> str:
    return f"<p:guest xmlns:p='{NAMESPACE}' {text}/>"


def test_identity_size_and_ports_are_read() -> None:
    devices = """<interface type='bridge'><mac address='52:54:00:AA:BB:CC'/><source bridge='br0'/>
        <target dev='vnet3'/><alias name='net0'/></interface>
        <interface type='direct'><source dev='eth0' mode='bridge'/><target dev='macvtap0'/></interface>"""
    arguments = parse_domain(domain(devices)).arguments
    assert (arguments.name, arguments.uuid) == ("web-1", "3d1f3c6a-5b5e-4c7a-9d53-0f3a5b6c7d8e")
    assert (arguments.machine, arguments.memory_bytes) == ("pc-q35-7.2", 2 << 30)
    first, second = arguments.nets
    assert (first.id, first.kind, first.ifname, first.mac) == ("net0", "tap", "vnet3", "52:54:00:aa:bb:cc")
    assert (second.kind, second.ifname) == ("tap", "macvtap0")
    assert list(explain_untappable(arguments)) == []


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("<interface type='user'/>", "slirp"),
        ("<interface type='user'><backend type='passt'/></interface>", "passt"),
        ("<interface type='vhostuser'><source type='unix' path='/s' mode='client'/></interface>", "mirror port"),
        ("<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>", "representor"),
        ("<interface type='mcast'><source address='230.0.0.1' port='5558'/></interface>", "between processes"),
        (f"<interface type='hostdev'>{PCI}</interface>", "vfio-pci 0000:3b:02.1"),
        (f"<hostdev mode='subsystem' type='pci' managed='yes'>{PCI}</hostdev>", "vfio-pci 0000:3b:02.1"),
    ],
)
def test_a_network_without_a_port_is_named(device, words) -> None:
    (note,) = explain_untappable(parse_domain(domain(device)).arguments)
    assert words in note


def test_a_usb_stick_is_no_network() -> None:
    usb = "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/></source></hostdev>"
    assert list(explain_untappable(parse_domain(domain(usb)).arguments)) == []


@pytest.mark.parametrize(("kind", "name"), [("sev", "AMD SEV"), ("sev-snp", "SEV-SNP"), ("tdx", "Intel TDX")])
def test_encrypted_memory_is_named(kind, name) -> None:
    found = parse_domain(domain(more=f"<launchSecurity type='{kind}'/>"))
    (why,) = explain_unreadable(found.arguments, found.arch)
    assert name in why


def test_a_domain_says_whether_it_is_to_be_watched_and_what_it_is() -> None:
    found = parse_domain(domain(metadata=marked("watch='yes' tags='web, prod,,web'")))
    assert (found.wanted, found.tags, found.troubles) == (True, ("web", "prod"), ())
    assert parse_domain(domain(metadata=marked("watch='no'"))).wanted is False
    assert parse_domain(domain(metadata=marked("watch=' No'"))).wanted is False
    assert parse_domain(domain(metadata=marked("tags='web'"))).wanted is None
    other = "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'/>"
    assert parse_domain(domain(metadata=other)).troubles == ()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (marked("watch='maybe'"), "'maybe' is neither"),
        (marked("watched='yes'"), "no attribute 'watched'"),
        (f"<p:host xmlns:p='{NAMESPACE}'/>", "<host> where <guest>"),
    ],
)
def test_a_mistake_in_the_metadata_is_named_and_asks_for_nothing(metadata, words) -> None:
    found = parse_domain(domain(metadata=metadata))
    (trouble,) = found.troubles
    assert words in trouble
    assert found.wanted is None


pieces = st.sampled_from(
    ["<domain>", "</domain>", "<devices>", "<interface type='bridge'>", "<memory unit='x'>9", "<metadata>", "<name/>",
     "<hostdev type='pci'>", "<source><address bus='zz'/>", "<os><type/>", marked("watch='1'"), "&", "\0"]
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(pieces | st.text(max_size=9), max_size=12).map("".join))
def test_any_text_is_read_without_an_exception(text) -> None:
    parse_domain(text)
    parse_domain(domain(devices=text, metadata=text))
