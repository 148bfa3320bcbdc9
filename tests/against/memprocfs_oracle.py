"""MemProcFS on a Windows image, offline, in a child process: its processes and its map of the net.

It is AGPL and stays an installed engine that tests ask; it takes kernels only whose PDB it knows by GUID.
"""

import json
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TCP_ENDPOINT, TCP_LISTENER, UDP_ENDPOINT = (int.from_bytes(tag, "big") for tag in (b"TcpE", b"TcpL", b"UdpA"))


def ask(image: Path, *, live: bool = False, timeout_s: float = 60) -> dict[str, list[dict[str, Any]]]:
    """``processes`` and ``net``; ``live``: the file changes while it is read."""
    device = f"file://file={image},volatile=1" if live else str(image)
    done = subprocess.run(
        [sys.executable, "-m", "tests.against.memprocfs_oracle", device],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _main(device: str) -> dict[str, Any]:
    import memprocfs

    options = ["-disable-symbolserver", "-disable-python", "-disable-yara", "-waitinitialize"]
    vmm = memprocfs.Vmm(["-device", device, *options])
    processes = [
        {
            "pid": each.pid,
            "ppid": each.ppid,
            "name": each.name,
            "eprocess": each.eprocess,
            "path": each.pathkernel,
            "command": _command(each),
        }
        for each in vmm.process_list()
    ]
    net = [
        {
            "tag": row["pooltag"],
            "pid": row["pid"],
            "state": row["state"],
            "va": row["va"],
            "local": (_address(row["src-ip"]), row["src-port"]),
            "remote": (_address(row["dst-ip"]), row["dst-port"]),
        }
        for row in vmm.maps.net()
    ]
    return {"processes": processes, "net": net}


def _command(process: Any) -> str | None:
    try:
        return process.cmdline
    except RuntimeError:  # it has ended
        return None


def _address(text: str) -> str | None:
    return None if text == "***" else str(ip_address(text))


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1])))
