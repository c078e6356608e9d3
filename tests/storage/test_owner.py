"""The name of a process: no other has it, whatever its host is called; and whether its bearer lives."""

import os
import socket
import subprocess
import sys

import pytest
from finebridge.storage.owner import host_of, lives, me

NAME = "from finebridge.storage.owner import me; print(me())"


def test_a_process_lives_until_it_ends() -> None:
    command = [sys.executable, "-c", NAME + "; input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert name != me()
    assert lives(name)
    child.kill()
    child.stdout.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lives(name) is False, "a zombie writes nothing"
    child.wait()
    assert lives(name) is False


def test_a_later_process_with_the_same_number_is_another() -> None:
    host, place, pid, start = me().rsplit("-", 3)
    assert lives(me())
    assert lives(f"{host}-{place}-{pid}-{int(start) - 1}") is False
    assert host_of(me()) == host == socket.gethostname()


def test_of_other_machines_and_containers_nothing_is_told() -> None:
    host, place, pid, start = me().rsplit("-", 3)
    for other in (f"{host}-0{place}-{pid}-{start}", f"{host}-{place}-x-{start}", f"{host}-{pid}", "", "a-b-c-d-e"):
        assert lives(other) is None


def test_a_container_of_the_same_host_name_is_told_apart() -> None:
    """Its process 1 is not the machine's process 1."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"namespaces are not permitted here: {done.stderr.strip()}")
    assert host_of(done.stdout.strip()) == socket.gethostname()
    assert done.stdout.split("-")[-2] == "1"
    assert lives(done.stdout.strip()) is None


HIDDEN = """
import os, sys
from finebridge.storage import owner
name = owner.me()
if os.fork() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    print(owner.lives(name), flush=True)
    os._exit(0)
os.wait()
"""


def test_another_users_process_that_proc_hides_is_not_taken_for_dead() -> None:
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "sh",
        "-c",
        'mount -t proc -o hidepid=2 proc /proc; exec "$0" -c "$1"',
    ]
    done = subprocess.run([*command, sys.executable, HIDDEN], capture_output=True, text=True, check=False)
    if done.returncode or os.getuid():
        pytest.skip(f"namespaces are not permitted here: {done.stderr.strip()}")
    assert done.stdout == "None\n", done.stderr
