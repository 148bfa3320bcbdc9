"""Images: what is built, and when it is not built again."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lab import image
from lab.packages import LabError


def truth_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("truth_script", image.COMMON / "truth.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", image.names())
def test_every_guest_names_its_kernel_and_a_truth_script_that_exists(name: str) -> None:
    recipe = image._recipe(name)
    assert recipe["choose"] in {"newest", "oldest"}
    assert recipe["kernel"].startswith("linux-image-")
    assert (image.IMAGES / recipe["truth"]).is_file()


def test_an_unknown_guest_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(LabError, match=r"no guest .nonesuch.; there are: .*debian-12-cloud"):
        image.build("nonesuch")


@pytest.mark.system
def test_a_built_image_is_found_again_at_once_without_any_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    first = image.build("debian-12-cloud")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert image.build("debian-12-cloud") == first
    assert "cloud" in first.release
    assert first.kernel.read_bytes()[0x202:0x206] != b""


def test_modules_are_loaded_after_what_they_depend_on() -> None:
    def module(depends: str) -> bytes:
        return b"license=GPL\0depends=" + depends.encode() + b"\0name=x\0"

    modules = {"virtio_net": module("virtio,net_failover"), "net_failover": module("failover"), "failover": module("")}
    assert image._in_load_order(modules, ["virtio_net", "built_in"]) == ["failover", "net_failover", "virtio_net"]


def test_the_truth_script_reads_every_form_of_address_ss_prints(tmp_path: Path) -> None:
    text = "\n".join(
        [
            'tcp ESTAB 0 0 [::ffff:10.77.0.11]:80 [::ffff:10.77.0.1]:4242 users:(("a b",pid=7,fd=9),("x",pid=5,fd=9))',
            "udp UNCONN 0 0 *:53 *:*",
            "udp UNCONN 0 0 127.0.0.53%lo:53 0.0.0.0:*",
            "tcp TIME-WAIT 0 0 [fe80::1%eth0]:22 [fe80::2]:9",
        ]
    )
    mapped, wildcard, bound, scoped = truth_script().parse(text, 1)
    assert (mapped["local"], mapped["remote"], mapped["rport"]) == ("::ffff:10.77.0.11", "::ffff:10.77.0.1", 4242)
    assert mapped["owners"] == [{"name": "x", "pid": 5, "fd": 9}, {"name": "a b", "pid": 7, "fd": 9}]
    assert (wildcard["local"], wildcard["lport"], wildcard["remote"], wildcard["rport"]) == ("::", 53, None, None)
    assert (bound["local"], bound["device"]) == ("127.0.0.53", "lo")
    assert (scoped["local"], scoped["state"], scoped["device"]) == ("fe80::1", "TIME-WAIT", "eth0")
