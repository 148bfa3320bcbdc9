"""The control socket, with real sockets: who is served, what it bears, what it survives."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from appliance.errors import ConfigError, UsageError
from appliance.respond import ControlServer, ControlTaken
from appliance.respond.control import Limits
from tests.respond.desks import PATIENCE_S, eventually

PATIENT = Limits(idle_s=PATIENCE_S, send_s=PATIENCE_S)


def echo(body, who):
    if body == "usage":
        raise UsageError("not so")
    if body == "defect":
        raise ZeroDivisionError
    return {"heard": body, "who": who}


@pytest.fixture
def told():
    return []


@pytest.fixture
def server(tmp_path, told):
    one = ControlServer(tmp_path / "control.sock", echo, told.append, limits=PATIENT)
    yield one
    one.close()


def connect(server):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(PATIENCE_S)
        client.connect(str(server.path))
    except BaseException:
        client.close()
        raise
    return client


def ask(server, *lines):
    """Send lines, say goodbye, read all answers."""
    with connect(server) as client:
        client.sendall(b"".join(line + b"\n" for line in lines))
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answers:
            return [json.loads(line) for line in answers]


def read_answer(client):
    with client.makefile("rb") as answers:
        return json.loads(answers.readline())


def test_a_line_is_answered_by_a_line_and_who_asks_is_known(server):
    (answer,) = ask(server, b'{"do": "status"}')
    assert answer["ok"] is True
    assert answer["result"]["heard"] == {"do": "status"}
    assert answer["result"]["who"]


def test_several_lines_at_once_are_answered_in_order(server):
    answers = ask(server, b"1", b"", b"2", b"  ", b"3")
    assert [answer["result"]["heard"] for answer in answers] == [1, 2, 3]


def test_a_last_line_without_its_newline_is_answered(server):
    with connect(server) as client:
        client.sendall(b"17")
        client.shutdown(socket.SHUT_WR)
        assert read_answer(client)["result"]["heard"] == 17


@pytest.mark.parametrize(
    "garbage",
    [b"{", b"\xff\xfe\x00", b"GET / HTTP/1.1", b"[" * 10_000, b"1" * 9_000, b'"\xed\xa0\x80"', b"{'do': 'status'}"],
)
def test_garbage_is_answered_with_words_and_the_client_stays(server, garbage):
    wrong, right = ask(server, garbage, b"5")
    assert wrong["ok"] is False
    assert wrong["code"] == 2
    assert "JSON" in wrong["error"]
    assert right["result"]["heard"] == 5


def test_an_error_carries_its_exit_code_and_a_defect_is_told(server, told):
    usage, defect = ask(server, b'"usage"', b'"defect"')
    assert (usage["error"], usage["code"]) == ("not so", 2)
    assert defect["code"] == 70
    assert "ZeroDivisionError" in told[0]


def test_a_huge_line_ends_the_conversation_and_nothing_else(server):
    with connect(server) as client, connect(server) as other:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have heard enough
            client.sendall(b"x" * (1 << 20))
        other.sendall(b"1\n")
        assert read_answer(other)["result"]["heard"] == 1
        eventually(lambda: gone(client), "the client with the huge line is sent away")


def gone(client):
    try:
        while chunk := client.recv(65536):
            assert b"at most" in chunk
    except ConnectionResetError:
        pass
    return True


def test_a_huge_line_is_told_so(server):
    (answer,) = ask(server, b"x" * 17_000)
    assert answer["code"] == 2
    assert "16384 bytes" in answer["error"]


def test_many_clients_are_served_and_one_too_many_is_told_so(tmp_path, told):
    server = ControlServer(tmp_path / "c.sock", echo, told.append, limits=Limits(clients=4, idle_s=PATIENCE_S))
    try:
        clients = [connect(server) for _ in range(4)]
        for client in clients:
            client.sendall(b"1\n")
            assert read_answer(client)["ok"]
        with connect(server) as late:
            answer = read_answer(late)
            assert answer["ok"] is False
            assert "4 clients" in answer["error"]
        for client in clients:
            client.close()
        eventually(lambda: served(server), "room is made by clients that leave")
    finally:
        server.close()


def served(server):
    try:
        return ask(server, b"1")[0]["ok"]
    except (ConnectionResetError, BrokenPipeError):
        return False


def test_a_crowd_of_clients_gets_each_its_own_answers(server):
    wrong = []

    def talk(number):
        for turn in range(20):
            body = [number, turn]
            while True:
                (answer,) = ask(server, json.dumps(body).encode())
                if answer["ok"]:
                    break
            if answer["result"]["heard"] != body:
                wrong.append((body, answer))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wrong


def test_a_client_that_says_nothing_is_sent_away(tmp_path, told):
    server = ControlServer(tmp_path / "c.sock", echo, told.append, limits=Limits(idle_s=0.05))
    try:
        with connect(server) as client:
            client.sendall(b'{"never": ')
            assert client.recv(100) == b""
    finally:
        server.close()


def test_a_client_that_drips_bytes_does_not_stay_longer_for_it(tmp_path, told):
    server = ControlServer(tmp_path / "c.sock", echo, told.append, limits=Limits(idle_s=0.2))
    try:
        with connect(server) as client:
            client.settimeout(0.02)

            def sent_away():
                try:
                    client.send(b" ")
                    return client.recv(1) == b""
                except TimeoutError:
                    return False
                except OSError:
                    return True

            eventually(sent_away)
    finally:
        server.close()


def test_a_client_that_never_fetches_its_answers_stops_only_itself(tmp_path, told):
    big = "y" * 4_000_000
    server = ControlServer(tmp_path / "c.sock", lambda *_: big, told.append, limits=Limits(send_s=0.1))
    try:
        with connect(server) as lazy:
            lazy.sendall(b"1\n" * 50)
            (answer,) = ask(server, b"1")
            assert answer["result"] == big
            eventually(lambda: not server._clients, "the lazy one is given up")
    finally:
        server.close()


def test_a_client_that_leaves_in_the_middle_harms_nobody(server, told):
    for _ in range(50):
        client = connect(server)
        client.sendall(b'{"do": "sta')
        client.close()
    for _ in range(50):
        client = connect(server)
        client.sendall(b"1\n" * 30)
        client.close()
    eventually(lambda: not server._clients)
    assert served(server)
    assert not told


def test_the_socket_is_for_its_owner_only_whatever_the_umask(tmp_path, told):
    before = os.umask(0)
    try:
        server = ControlServer(tmp_path / "c.sock", echo, told.append)
    finally:
        os.umask(before)
    try:
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(server.path.with_suffix(".lock").stat().st_mode) == 0o600
    finally:
        server.close()
    assert not server.path.exists()


@pytest.mark.root("becomes another user")
def test_another_user_is_not_served_even_where_the_socket_lets_him_in(tmp_path, told):
    stranger = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setgroups([]); os.setresgid(*[65534] * 3);"
        "os.setresuid(*[65534] * 3); s.connect(sys.argv[1]);"
        "print(s.makefile('rb').readline().decode())"
    )
    server = ControlServer(tmp_path / "c.sock", echo, told.append, limits=PATIENT)
    try:
        server.path.chmod(0o666)
        descriptor = os.open(server.path, os.O_PATH)  # the folders above are closed to him
        done = subprocess.run(
            [sys.executable, "-c", stranger, f"/proc/self/fd/{descriptor}"],
            check=True,
            pass_fds=[descriptor],
            stdout=subprocess.PIPE,
            timeout=PATIENCE_S,
        )
        os.close(descriptor)
        answer = json.loads(done.stdout)
        assert answer["code"] == 5
        assert "only root" in answer["error"]
    finally:
        server.close()


def test_a_stale_socket_is_replaced(tmp_path, told):
    path = tmp_path / "control.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    server = ControlServer(path, echo, told.append)
    assert served(server)
    server.close()


def test_the_socket_of_a_killed_appliance_is_taken_over(tmp_path, told):
    path = tmp_path / "control.sock"
    child = (
        "import sys, time, pathlib; from appliance.respond import ControlServer;"
        "ControlServer(pathlib.Path(sys.argv[1]), lambda *_: 1, print); print('up', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"up\n"
        with pytest.raises(ControlTaken, match=rf"already running \(pid {other.pid}\): use `parasight status`"):
            ControlServer(path, echo, told.append)
        assert path.exists()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert path.exists()
    server = ControlServer(path, echo, told.append)
    assert served(server)
    server.close()


def test_a_living_socket_is_refused_and_left_alone(server, told):
    with pytest.raises(ControlTaken):
        ControlServer(server.path, echo, told.append)
    assert served(server)


def test_a_file_in_the_way_is_not_removed(tmp_path, told):
    path = tmp_path / "control.sock"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        ControlServer(path, echo, told.append)
    assert path.read_text() == "mine"


def test_a_folder_with_too_long_a_name_is_told_so(tmp_path, told):
    with pytest.raises(ConfigError, match="PARASIGHT_RUN_DIR"):
        ControlServer(tmp_path / ("x" * 120) / "control.sock", echo, told.append)


def test_a_folder_that_cannot_be_made_is_told_so(tmp_path, told):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="PARASIGHT_RUN_DIR"):
        ControlServer(tmp_path / "file" / "control.sock", echo, told.append)


def test_closing_lets_the_answer_under_way_go_out(tmp_path, told):
    begun, go = threading.Event(), threading.Event()

    def slow(body, who):
        begun.set()
        go.wait(PATIENCE_S)
        return "done"

    server = ControlServer(tmp_path / "c.sock", slow, told.append, limits=PATIENT)
    with connect(server) as client:
        client.sendall(b"1\n")
        assert begun.wait(PATIENCE_S)
        closing = threading.Thread(target=server.close)
        closing.start()
        go.set()
        assert read_answer(client)["result"] == "done"
        closing.join(PATIENCE_S)
    server.close()
    assert not closing.is_alive()


def test_the_housekeeping_goes_on_whatever_it_raises(tmp_path, told):
    ticks = []

    def tick():
        ticks.append(1)
        raise ZeroDivisionError

    server = ControlServer(tmp_path / "c.sock", echo, told.append, tick=tick, limits=Limits(tick_s=0.01))
    eventually(lambda: len(ticks) > 3)
    server.close()
    assert len(told) == 1
    assert "ZeroDivisionError" in told[0]
