"""The agent of a Xen domain: the one of every guest, on the paravirtual console, since there is no virtio.

Each message begins with a record separator (RFC 7464), so that dom0's end can tell it from what else is written there.
"""

import os
import tty

from agent import Agent, prepare


class ConsoleAgent(Agent):
    """The agent, with its messages marked."""

    mark = b"\x1e"


def main() -> None:
    prepare()
    line = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    agent = ConsoleAgent(line)
    agent.send(job=0, ok=True)  # dom0's end passes nothing on before
    agent.serve()


if __name__ == "__main__":
    main()
