"""Who owns a filter: one life of one process, also of a process in a container."""

import os
import subprocess
import sys
import time

import pytest

from appliance.tap.bpf import owner as module
from appliance.tap.bpf.owner import Owner

CHILD = "import time; from appliance.tap.bpf.owner import Owner; print(Owner.me(), flush=True); time.sleep(600)"


def test_we_live_and_our_name_can_be_read_again() -> None:
    me = Owner.me()
    assert (me.pid, me.find()) == (os.getpid(), os.getpid())
    assert not me.is_gone()
    assert Owner.parse(str(me)) == me


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "1:2:x", "-1:2:3", "1:²:3", "parasight_tap"])
def test_what_is_no_owner_is_none(text) -> None:
    assert Owner.parse(text) is None


def test_another_life_of_a_pid_is_gone() -> None:
    me = Owner.me()
    assert Owner(me.pid, me.started + 1, me.pid_ns).is_gone()


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        owner = Owner.parse(child.stdout.readline().strip())
        assert owner is not None
        assert owner.find() == child.pid
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert owner.is_gone()


@pytest.mark.root("a pid namespace")
@pytest.mark.parametrize("options", [["--mount-proc"], []], ids=["own-proc", "proc-of-the-host"])
def test_a_process_of_another_pid_namespace_is_found_under_its_number_here(options) -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", *options, sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        owner = Owner.parse(child.stdout.readline().strip())
        assert owner is not None
        assert owner.pid == 1
        assert owner.pid_ns != Owner.me().pid_ns
        found = owner.find()
        assert found not in {None, 1, child.pid}
        assert not owner.is_gone()
        child.kill()
        deadline = time.monotonic() + 30
        while owner.find() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_a_pid_namespace_that_we_cannot_see_into_nothing_is_certain(monkeypatch) -> None:
    stranger = Owner(4, 1, 4026539999)
    monkeypatch.setattr(module, "_our_pid_ns", lambda: module.INITIAL_PID_NS)
    assert stranger.is_gone(), "from the initial one everything is seen"
    monkeypatch.setattr(module, "_our_pid_ns", lambda: 4026538888)
    assert not stranger.is_gone()
