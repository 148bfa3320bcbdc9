"""The agent of a Xen domain: the one of every guest, on the paravirtual console, since there is no virtio.

Each message begins with a record separator (RFC 7464), so that dom0's end can tell it from what else is written there.
Dom0's end passes nothing on before it has heard one, and may come late: the agent says that it is there until somebody
answers. Until that end is in raw mode it may echo what is said: what is no order is passed over.
"""

import json
import os
import threading
import tty

from agent import Agent, prepare

ANNOUNCE_S = 2.0


class ConsoleAgent(Agent):
    """The agent, with its messages marked."""

    mark = b"\x1e"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.heard = threading.Event()

    def announce(self) -> None:
        """Say that it is there, until the first order comes."""
        while not self.heard.is_set():
            self.send(job=0, ok=True)
            self.heard.wait(ANNOUNCE_S)

    def serve(self) -> None:
        rest = b""
        while True:
            *lines, rest = (rest + os.read(self.fd, 65536)).split(b"\n")
            for line in lines:
                try:
                    order = json.loads(line)
                except ValueError:
                    continue
                if isinstance(order, dict) and "do" in order:
                    self.heard.set()
                    self.handle(order)


def main() -> None:
    prepare()
    line = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    agent = ConsoleAgent(line)
    threading.Thread(target=agent.announce, daemon=True).start()
    agent.serve()


if __name__ == "__main__":
    main()
