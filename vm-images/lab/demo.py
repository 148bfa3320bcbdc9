"""`./run demo`: a guest does honest work, a parasite enters its web server, Parasight says who it is.

The appliance is run as a person would run it: the command `parasight watch`, knowing nothing but QEMU's pid. The demo
fails (exit code 1) if the parasite was missed, an honest connection was flagged, or an owner differs from what the
guest's own `ss` says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.cli import story
from lab.accel import accelerator
from lab.guest import Guest, boot
from lab.image import build
from lab.network import WORLD_IP4, Network
from lab.packages import LabError
from lab.world import NAMES, SINK_PORT, Caller, World

ROOT = Path(__file__).resolve().parents[2]
HONEST_S, PARASITE_S = 6.0, 4.0
Json = dict[str, Any]
Tuple = tuple[str, str, str]

# ss -tuanpOH: netid state recv-q send-q local remote [users:(("name",pid=1,fd=2),...)]
_SS = re.compile(r"^(tcp|udp)\s+\S+\s+\d+\s+\d+\s+(\S+)\s+(\S+)(?:\s+users:\((.*)\))?")


class Watch:
    """`parasight watch` as a child: its verdicts as they come, its summary at the end."""

    def __init__(self, target: str, home: Path, *, enforce: bool) -> None:
        rules = ROOT / "rules" / "debian-server.yaml"
        command = [sys.executable, "-m", "appliance.cli", "watch", target, "--output", "jsonl"]
        if enforce:
            enforced = home / "debian-server-enforced.yaml"
            enforced.write_text(rules.read_text().replace("  mode: monitor\n", "  mode: enforce\n", 1))
            command += ["--enforce", "--rules", str(enforced)]
        else:
            command += ["--rules", str(rules.relative_to(ROOT))]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "PARASIGHT_STATE": str(home),
                "PARASIGHT_RUN_DIR": str(home),
                "XDG_CACHE_HOME": str(home),
            },
        )
        self.verdicts: list[Json] = []
        self.summary: Json = {}
        self._reader = threading.Thread(target=self._read, daemon=True)

    def wait_ready(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            say(f"parasight: {line.rstrip()}")
            if line.strip() == "ready":
                self._reader.start()
                return
        raise LabError(f"parasight watch ended with {self._process.wait()} before it was ready")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            body = json.loads(line)
            if body.get("summary"):
                self.summary = body
            else:
                self.verdicts.append(body)
                story.print_row(body)

    def end(self) -> None:
        """Ask it to stop and take its last words."""
        self._process.terminate()
        self._reader.join(timeout=20)
        self._process.wait(timeout=20)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def asked_ss(guest: Guest) -> Iterator[dict[Tuple, set[int]]]:
    """Let the guest's own ss run all the time; after the block: the pids it saw holding each socket."""
    seen: dict[Tuple, set[int]] = defaultdict(set)
    job = guest.spawn("while :; do /usr/bin/ss -tuanpOH >>/tmp/ss.log; sleep 0.03; done")
    yield seen
    job.kill()
    for line in guest.get("/tmp/ss.log").decode(errors="replace").splitlines():
        if match := _SS.match(line):
            protocol, local, remote, users = match.groups()
            pids = re.findall(r"pid=(\d+)", users or "")
            seen[protocol, local, "*" if remote.endswith(":*") else remote].update(map(int, pids))


def run(image_name: str, memory_mb: int, *, enforce: bool) -> int:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parasight-demo-")))
        image = build(image_name, say)
        network = stack.enter_context(Network())
        stack.enter_context(World(network))
        say(f"booting {image.name} (Linux {image.release}, {memory_mb} MiB) under {accelerator().upper()}")
        guest = stack.enter_context(boot(image, network, name="web-01", memory_mb=memory_mb))
        _do(guest, "/opt/demo/web.sh")
        workers = [int(pid) for pid in _do(guest, "pgrep -P $(cat /run/nginx.pid)").split()]
        watch = Watch(f"qemu:{guest.pid}", home, enforce=enforce)
        stack.callback(watch.close)
        watch.wait_ready()
        with asked_ss(guest) as seen:
            say("honest work: clients call the web server, the updater asks DNS and fetches over IPv4 and IPv6")
            updater = guest.spawn(f"exec /usr/local/bin/updater {next(iter(NAMES))} 80 0.7")
            seconds = HONEST_S + PARASITE_S
            caller = Caller(network, [guest.ip4, guest.ip6], tcp=(80,), seconds=seconds, pause_s=0.4, hold_s=0.15)
            stack.enter_context(caller)
            time.sleep(HONEST_S)
            say(f"a parasite enters nginx[{workers[0]}]: a library is loaded by ptrace, its thread connects out")
            _do(guest, f"/opt/parasite/infect.sh {workers[0]} {WORLD_IP4} {SINK_PORT} rwx")
            time.sleep(PARASITE_S)
            updater.kill()
            served = caller.wait()
            say(f"nginx served {served.done} calls, {served.failed} failed")
        watch.end()
        story.print_summary(watch.summary)
        mistakes = judge(watch.verdicts, seen, workers[0], enforce=enforce)
        mistakes += [f"nginx failed {served.failed} honest calls"] if served.failed else []
        paused = [event["event"] for event in guest.events if event["event"] in ("STOP", "RESUME")]
    mistakes += [f"the guest was paused: {paused}"] if paused else []
    for mistake in mistakes:
        say(f"FAILED: {mistake}")
    if not mistakes:
        seconds = time.monotonic() - start
        caught = "named and stopped before its first packet left" if enforce else "named"
        say(f"PASSED in {seconds:.0f} s: the parasite is {caught}, nothing honest was flagged, owners agree with ss")
    return 1 if mistakes else 0


def judge(verdicts: list[Json], seen: dict[Tuple, set[int]], infected: int, *, enforce: bool) -> list[str]:
    """What went wrong, in sentences; empty when all is well."""
    mistakes, caught, compared = [], False, 0
    for body in verdicts:
        flow = body["flow"]
        row = f"{flow['protocol']} {_end(flow['local'])} {flow['direction']} {_end(flow['remote'])}"
        if flow["remote"]["port"] == SINK_PORT:
            right = body["verdict"] == "deny" and body["process"] and body["process"]["pid"] == infected
            stopped = (body["act"], body["act_done"]) == ("block", True)
            caught = bool(right and body["parasitic"] and (stopped or not enforce))
            mistakes += [] if caught else [f"the parasite's connection was not named rightly: {json.dumps(body)}"]
        elif body["verdict"] == "deny" or body["alert"]:
            mistakes.append(f"an honest connection was flagged: {row}: {body['because']}")
        holders = _holders(flow, seen)
        if holders and body["owners"]:
            compared += 1
            wrong = [owner["pid"] for owner in body["owners"] if owner["pid"] not in holders]
            mistakes += [f"{row}: owner {wrong}, but ss says {sorted(holders)}"] if wrong else []
    if not caught:
        mistakes.append("the parasite was missed")
    if compared < 10:
        mistakes.append(f"only {compared} owners could be compared with ss")
    say(f"{len(verdicts)} verdicts, {compared} owners compared with the guest's own ss")
    return mistakes


def _holders(flow: Json, seen: dict[Tuple, set[int]]) -> set[int]:
    """The pids ss saw on the flow's socket, and on the sockets that listen on its port."""
    protocol, local, remote = flow["protocol"], _end(flow["local"]), _end(flow["remote"])
    exact = seen.get((protocol, local, remote), set())
    port = local.rpartition(":")[2]
    bound = [
        pids
        for (kind, at, to), pids in seen.items()
        if kind == protocol and to == "*" and at.rpartition(":")[2] == port
    ]
    return exact | set().union(*bound)


def _end(end: Json) -> str:
    return f"[{end['ip']}]:{end['port']}" if ":" in end["ip"] else f"{end['ip']}:{end['port']}"


def _do(guest: Guest, command: str) -> str:
    done = guest.run(command)
    if done.returncode != 0:
        raise LabError(f"`{command}` failed in the guest: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--image", default="debian-12-cloud", help="a folder of vm-images")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--enforce", action="store_true", help="let the rules act: the parasite is stopped, too")
    options = parser.parse_args()
    try:
        return run(options.image, options.memory, enforce=options.enforce)
    except LabError as error:
        say(str(error))
        return 6


if __name__ == "__main__":
    sys.exit(main())
