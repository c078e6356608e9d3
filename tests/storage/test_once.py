"""An artifact is built once, by real processes; neither a dead owner nor a failed build stops the next."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from finebridge.storage import manifest, once
from finebridge.storage.manifest import ManifestError, verify
from finebridge.storage.once import build_once, locked, verify_once
from finebridge.storage.publish import publish

Start = Callable[..., "subprocess.Popen[str]"]

# argv: target, log. Asks for the artifact as soon as a line comes in; the build takes long enough for all to meet it.
ASKER = """
import os, sys, time
from pathlib import Path
from finebridge.storage.once import build_once
def build(folder, tell):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
    (folder / "data").write_text("built")
    return {"by": os.getpid()}
print("ready", flush=True)
sys.stdin.readline()
print(build_once(Path(sys.argv[1]), build, kind="dataset"))
"""

# Takes the lock (or enters the build) and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from finebridge.storage.once import build_once, locked, verify_once
from finebridge.storage.publish import publish
def build(folder, tell):
    (folder / "data").write_text("half")
    print("inside", flush=True)
    time.sleep(600)
if sys.argv[2] == "build":
    build_once(Path(sys.argv[1]), build, kind="dataset")
else:
    with locked(Path(sys.argv[1])):
        print("inside", flush=True)
        time.sleep(600)
"""


def build(folder: Path, _tell: Any = None) -> Mapping[str, Any]:
    (folder / "data").write_text("built")
    return {"source": "s"}


def refuse(_folder: Path, _tell: Any = None) -> Mapping[str, Any]:
    raise AssertionError("built although it stands")


def hold(start: Start, path: Path, what: str) -> "subprocess.Popen[str]":
    child = start(HOLDER, path, what)
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n", child.communicate()[1]
    return child


def test_six_processes_build_exactly_once(start: Start, tmp_path: Path) -> None:
    children = [start(ASKER, tmp_path / "out" / "x", tmp_path / "log") for _ in range(6)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 6, said
    assert sorted(out.strip() for out, _ in said) == ["False"] * 5 + ["True"]
    (builder,) = (tmp_path / "log").read_text().split()
    assert verify(tmp_path / "out" / "x")["made_from"] == {"by": int(builder)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".x.verified", "x"]


def test_a_standing_artifact_is_used_as_it_is(tmp_path: Path) -> None:
    said: list[str] = []
    assert build_once(tmp_path / "x", build, kind="dataset", say=said.append) is True
    assert build_once(tmp_path / "x", refuse, kind="dataset", say=said.append) is False
    assert verify(tmp_path / "x")["made_from"] == {"source": "s"}
    assert said == []


def test_a_builder_killed_half_way_does_not_hang_the_next(start: Start, tmp_path: Path) -> None:
    child = hold(start, tmp_path / "x", "build")
    child.kill()
    child.wait()
    code = f"""
from pathlib import Path
from finebridge.storage.once import build_once
def build(folder, tell):
    (folder / "data").write_text("built")
    return {{}}
print(build_once(Path({str(tmp_path / "x")!r}), build, kind="dataset"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r".* is dead or stands still; going on without it\nTrue\n", done.stdout)
    verify(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.verified", "x"]


def test_a_waiter_says_what_it_waits_for_and_goes_on_when_the_owner_is_killed(start: Start, tmp_path: Path) -> None:
    lock = tmp_path / "deep" / ".lock"
    child = hold(start, lock, "lock")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        child.kill()

    with locked(lock, say, every=0.01):
        assert said
    assert str(lock) in said[0]
    assert child.wait() < 0


def test_a_failing_build_raises_in_the_caller_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path, _tell: Any) -> Mapping[str, Any]:
        (folder / "data").write_text("half")
        raise ValueError("row 7 is bad")

    for _ in range(2):  # not remembered: each caller gets the cause itself
        with pytest.raises(ValueError, match="row 7 is bad"):
            build_once(tmp_path / "x", fail, kind="dataset")
        assert [path.name for path in tmp_path.iterdir()] == [".x.failed"]
    assert build_once(tmp_path / "x", build, kind="dataset") is True


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest"])
def test_a_damaged_artifact_is_built_again_and_that_is_said(tmp_path: Path, damage: str) -> None:
    build_once(tmp_path / "x", build, kind="dataset")
    data = tmp_path / "x" / "data"
    match damage:
        case "changed":
            data.write_text("BUILT")
        case "cut":
            data.write_text("b")
        case "missing":
            data.unlink()
        case _:
            data.with_name("manifest.json").unlink()
    said: list[str] = []
    assert build_once(tmp_path / "x", build, kind="dataset", say=said.append) is True
    assert data.read_text() == "built"
    verify(tmp_path / "x")
    assert said
    assert all(text.startswith("building again: ") for text in said)
    assert ("data" if damage != "no manifest" else "manifest.json") in said[0]


def test_a_damaged_artifact_stays_when_it_cannot_be_built_again(tmp_path: Path) -> None:
    build_once(tmp_path / "x", build, kind="dataset")
    (tmp_path / "x" / "data").write_text("evidence")

    def fail(_folder: Path, _tell: Any) -> Mapping[str, Any]:
        raise ValueError("the source is gone")

    with pytest.raises(ValueError, match="the source is gone"):
        build_once(tmp_path / "x", fail, kind="dataset", say=lambda _: None)
    assert (tmp_path / "x" / "data").read_text() == "evidence"


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again while nothing was written to them; after that they are, even under the same size and times."""
    target = tmp_path / "a"
    with publish(target, kind="dataset", made_from={}) as folder:
        (folder / "data").write_text("made")
    hashed: list[str] = []
    honest = manifest.file_digest
    monkeypatch.setattr(manifest, "file_digest", lambda path, kind: (hashed.append(path.name), honest(path, kind))[1])
    assert verify_once(target) == verify_once(target)
    assert hashed == ["data"]
    state = (target / "data").stat()
    (target / "data").write_text("edit")
    os.utime(target / "data", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ManifestError, match="checksum"):
        verify_once(target)
    (tmp_path / ".a.verified").write_text("[")
    (target / "data").write_text("made")
    assert verify_once(target)["kind"] == "dataset"


WAITER = """
import sys, time
from pathlib import Path
from finebridge.storage import once
once._DEAD, once._TOLD = float(sys.argv[2]), 0.05
def build(folder, tell):
    tell("half of it")
    print("inside", flush=True)
    sys.stdin.readline()
    if sys.argv[3] == "full":
        raise OSError(28, "No space left on device")
    if sys.argv[3] == "bad":
        raise ValueError("row 7 is bad")
    (folder / "data").write_text(sys.argv[3])
    return {"by": sys.argv[3]}
try:
    print(once.build_once(Path(sys.argv[1]), build, kind="dataset"))
except (ValueError, OSError) as error:
    print(type(error).__name__, getattr(error, "errno", None), error)
"""


def line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    return child.stdout.readline()


@pytest.mark.parametrize(("how", "kind", "number"), [("bad", "BuildFailedError", "None"), ("full", "OSError", "28")])
def test_waiters_fail_with_the_builders_error(start: Start, tmp_path: Path, how: str, kind: str, number: str) -> None:
    """They do not build, one after the other, what cannot be built; who comes later tries anew."""
    builder = start(WAITER, tmp_path / "x", 20, how)
    assert [line(builder), line(builder)] == ["half of it\n", "inside\n"]
    waiters = [start(WAITER, tmp_path / "x", 20, "other") for _ in range(2)]
    for child in waiters:
        assert line(child).startswith(f"waiting for process {builder.pid} on ")
    builder.communicate("go on\n", timeout=60)
    for child in waiters:
        said = child.communicate(timeout=60)[0].splitlines()[-1]
        assert said.startswith(f"{kind} {number} "), said
        assert f"met by process {builder.pid} on {socket.gethostname()}, which built {tmp_path / 'x'}" in said
    later = start(WAITER, tmp_path / "x", 20, "later")
    assert later.communicate("go on\n", timeout=60)[0].endswith("inside\nTrue\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.verified", "x"]


def test_a_builder_that_stands_still_is_replaced_and_does_no_harm_later(start: Start, tmp_path: Path) -> None:
    builder = start(WAITER, tmp_path / "x", 20, "first")
    assert [line(builder), line(builder)] == ["half of it\n", "inside\n"]
    builder.send_signal(signal.SIGSTOP)
    waiter = start(WAITER, tmp_path / "x", 3, "second")
    said, _ = waiter.communicate("go on\n", timeout=60)
    assert f"process {builder.pid} on {socket.gethostname()}, is dead or stands still" in said
    assert said.endswith("inside\nTrue\n")
    builder.send_signal(signal.SIGCONT)
    assert builder.communicate("go on\n", timeout=60)[0] == "False\n"
    assert verify(tmp_path / "x")["made_from"] == {"by": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.verified", "x"]


def test_a_waiter_tells_who_builds_since_when_and_how_far(tmp_path: Path) -> None:
    said: list[str] = []
    inside, done = threading.Event(), threading.Event()

    def slow(folder: Path, tell: Callable[[str], None]) -> Mapping[str, Any]:
        tell("进" * 400 + "34 % of it")
        inside.set()
        done.wait()
        return build(folder)

    def say(text: str) -> None:
        said.append(text)
        if "34 %" in text:
            done.set()

    builder = threading.Thread(target=build_once, args=(tmp_path / "x", slow), kwargs={"kind": "dataset", "say": len})
    builder.start()
    inside.wait()
    with locked(tmp_path / ".x.lock", say, every=0.01):
        builder.join()
    me = rf"process {os.getpid()} on {re.escape(socket.gethostname())}"
    assert re.search(
        rf"waiting for {me}, which holds .*/.x.lock since \d{{4}}-.* \(waited \d+ s\): 进+34 % of it", said[-1]
    )


def test_a_lock_that_another_waiter_took_meanwhile_is_given_back(tmp_path: Path) -> None:
    """Of two that see the same dead owner the slower one must not take the faster one's new lock for the dead one's."""
    path = tmp_path / "lock"
    path.write_text("the dead one's")
    slower = once._Watch(path, lambda _: None, 10.0)
    slower.look()
    path.write_text("the faster one's")
    slower._take_away("")
    assert path.read_text() == "the faster one's"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_that_was_created_just_now_is_not_judged_by_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"owner": f"{once.me()}0"}))
    waiter = once._Watch(path, lambda _: None, 10.0)
    waiter.look()
    assert not path.exists(), "its owner is dead"
    path.touch()
    waiter.look()
    waiter.look()
    assert path.exists(), "nothing is known of its owner yet"


def test_a_lock_without_room_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(once.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = f"machine-{'0' * 16}n1-7-7"  # a process of another machine


def test_who_holds_the_lock_clears_what_other_machines_left(tmp_path: Path) -> None:
    """A lock that stood still is taken away; so is what its owner had begun, of which nobody here could see that it is dead."""
    (tmp_path / f".x.tmp-{ELSEWHERE}-1234abcd" / "deep").mkdir(parents=True)
    for name in (f"..x.lock.tmp-{ELSEWHERE}-1234abcd", "..x.verified.tmp-1234abcd", "..x.failed.tmp-1234abcd"):
        (tmp_path / name).write_text("half")
    others = [f".y.tmp-{ELSEWHERE}-1234abcd", "..y.verified.tmp-1234abcd", f".x.tmp-{once.me()}-1234abcd"]
    for name in others:
        (tmp_path / name).mkdir()
    assert build_once(tmp_path / "x", build, kind="dataset") is True
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.verified", *others}, (
        "another target's, a living one's"
    )


def test_what_a_builder_left_that_died_after_it_had_published_is_cleared(start: Start, tmp_path: Path) -> None:
    child = start("from finebridge.storage.owner import me; print(me())")
    owner = child.communicate()[0].strip()
    build_once(tmp_path / "x", build, kind="dataset")
    (tmp_path / ".x.lock").write_text(json.dumps({"owner": owner}))
    (tmp_path / f".x.tmp-{owner}-1234abcd.old").mkdir()
    assert build_once(tmp_path / "x", refuse, kind="dataset") is False
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.verified"}
    (tmp_path / ".x.lock").write_text(json.dumps({"owner": ELSEWHERE}))
    (tmp_path / f".x.tmp-{ELSEWHERE}-1234abcd").mkdir()
    assert build_once(tmp_path / "x", refuse, kind="dataset") is False
    assert len(list(tmp_path.iterdir())) == 4, "it may be at work"


@pytest.mark.parametrize("other", ["is done", "is not done"])
def test_a_builder_that_was_replaced_drops_its_work(tmp_path: Path, other: str) -> None:
    """It stood still, another machine took its lock and cleared its folder: it uses what stands, or builds again."""
    builds: list[Path] = []

    def robbed(folder: Path, _tell: Any) -> Mapping[str, Any]:
        builds.append(folder)
        if len(builds) == 1:
            (tmp_path / ".x.lock").unlink()
            shutil.rmtree(folder)
            if other == "is done":
                build_once(tmp_path / "x", build, kind="dataset")
        return build(folder)

    assert build_once(tmp_path / "x", robbed, kind="dataset") is (other == "is not done")
    assert len(builds) == (1 if other == "is done" else 2)
    assert verify(tmp_path / "x")["made_from"] == {"source": "s"}
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.verified"}


def test_machines_that_share_a_disk_share_what_they_remember(tmp_path: Path) -> None:
    """Each has its own number for the device."""
    (tmp_path / "file").write_text("a")
    state = (tmp_path / "file").stat()
    times = {"st_mtime_ns": state.st_mtime_ns, "st_ctime_ns": state.st_ctime_ns}
    fields = list(state)
    fields[2] += 1
    assert os.stat_result(fields, times).st_dev != state.st_dev
    assert once.mark(os.stat_result(fields, times)) == once.mark(state)
