"""Runs `parasight` many times and imports it once: under emulation the imports take ten seconds, the rest does not.

An agent on a line of its own. A command is parasight's arguments; words of the form NAME=VALUE before them are put into
its environment. Each runs in a child that has done nothing yet, with its own streams, as if it had been started.
"""

import os
import re
import sys
import threading
import traceback
from typing import BinaryIO, NoReturn

sys.path[:0] = ["/opt/parasight", "/opt/site", "/opt/lab"]

from agent import Agent, port_path, prepare  # noqa: E402

from appliance.cli.main import run  # noqa: E402


class Child:
    """As much of a Popen as the agent uses."""

    def __init__(self, command: list[str]) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            become(command, out_end, err_end)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self.stderr = self.open(out), self.open(err)

    def open(self, end: int) -> BinaryIO:
        return os.fdopen(end, "rb", 0)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Runner(Agent):
    """Starts parasight in a fork of itself."""

    def spawn(self, job: int, command: str | list[str]) -> None:
        child = Child(command.split() if isinstance(command, str) else command)
        self.jobs[job] = child.pid
        self.send(job=job, pid=child.pid)
        threading.Thread(target=self.attend, args=(job, child), daemon=True).start()


def become(command: list[str], out: int, err: int) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 256)
        arguments = list(command)
        while arguments and (setting := re.fullmatch(r"([A-Z_]+)=(.*)", arguments[0])):
            os.environ[setting[1]] = setting[2]
            del arguments[0]
        sys.argv = ["parasight", *arguments]
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    prepare()
    os.chdir("/opt/parasight")
    Runner(os.open(port_path("lab.parasight"), os.O_RDWR)).serve()


if __name__ == "__main__":
    main()
