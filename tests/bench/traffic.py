"""Bounded traffic between two network namespaces: some TCP connections, so many messages a second, for so long."""

import socket
import sys
import threading
import time

PORT, CONNECTIONS, MESSAGE = 7100, 40, b"x" * 600


def serve(address: str) -> None:
    """Take everything and answer each message with a short one."""
    with socket.create_server((address, PORT), backlog=CONNECTIONS) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data[:20])


def send(address: str, seconds: float, rate: float) -> None:
    """One message after the other, round the connections, at an even pace."""
    ends = [socket.create_connection((address, PORT)) for _ in range(CONNECTIONS)]
    for end in ends:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    start, sent = time.monotonic(), 0
    while (now := time.monotonic() - start) < seconds:
        while sent < now * rate:
            end = ends[sent % CONNECTIONS]
            end.sendall(MESSAGE)
            end.recv(64)
            sent += 1
        time.sleep(0.002)
    for end in ends:
        end.close()


if __name__ == "__main__":
    role, address, *numbers = sys.argv[1:]
    if role == "serve":
        serve(address)
    else:
        send(address, *map(float, numbers))
