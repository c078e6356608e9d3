"""An artifact is whole or absent: errors, kills, races and the files that a killed writer leaves."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from finebridge.storage.manifest import ManifestError, newest_verified, steps, verify
from finebridge.storage.owner import me
from finebridge.storage.publish import commit, fsync_path, publish, stage, write_text

Start = Callable[..., "subprocess.Popen[str]"]

# Enters the block, writes a file, says so and waits: for a kill, or for a line on stdin.
WRITER = """
import sys
from pathlib import Path
from finebridge.storage.publish import publish
with publish(Path(sys.argv[1]), kind="test", made_from={}, replace=True) as folder:
    (folder / "a.txt").write_text("new")
    print("inside", flush=True)
    sys.stdin.readline()
"""

# Replaces a target; an audit hook acts at the very rename that would make the new one appear.
REPLACER = """
import os, signal, sys
from pathlib import Path
from finebridge.storage.publish import publish
target = Path(sys.argv[1])
hits = []
def hook(event, args):
    if event == "os.rename" and str(args[1]) == str(target) and not hits:
        hits.append(args)
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")
sys.addaudithook(hook)
with publish(target, kind="test", made_from={}, replace=True) as folder:
    (folder / "a.txt").write_text("new")
"""


def make(target: Path, text: str = "old", *, replace: bool = False) -> Path:
    with publish(target, kind="test", made_from={"from": text}, replace=replace) as folder:
        (folder / "a.txt").write_text(text)
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_inside(start: Start, target: Path) -> None:
    child = start(WRITER, target)
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n", child.communicate()[1]
    child.kill()
    child.wait()


def test_publish_makes_a_verified_artifact_and_nothing_else(tmp_path: Path) -> None:
    made_from: dict[str, str] = {}
    with publish(tmp_path / "deep" / "x", kind="dataset", made_from=made_from) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
        (folder / "a.txt").write_text("ä")
        made_from["late"] = "filled in the block"
        assert not (tmp_path / "deep" / "x").exists()
    manifest = verify(tmp_path / "deep" / "x")
    assert names(tmp_path / "deep") == ["x"]
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {"a.txt": 2, "sub/b.bin": 256}
    assert manifest["kind"] == "dataset"
    assert manifest["made_from"] == {"late": "filled in the block"}
    assert {"python", "finebridge", "torch"} <= set(manifest["tools"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish(tmp_path / "x", kind="test", made_from={}) as folder:  # noqa: PT012
        (folder / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ManifestError, match=r"link.*symbolic"),
        publish(tmp_path / "x", kind="test", made_from={}) as folder,
    ):
        (folder / "link").symlink_to("/etc/hostname")
    assert names(tmp_path) == []


def test_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path / "x")
    entered = False
    with pytest.raises(FileExistsError), publish(tmp_path / "x", kind="test", made_from={}):
        entered = True
    assert not entered
    assert names(tmp_path) == ["x"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), publish(tmp_path / "x", kind="test", made_from={}) as folder:  # noqa: PT012
        (folder / "a.txt").write_text("second")
        make(tmp_path / "x", "first")
    assert (tmp_path / "x" / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["x"]


def test_a_file_or_link_that_is_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        make(tmp_path / name, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file", "link"]
    assert not (tmp_path / "link").is_symlink()


def test_replace_keeps_the_old_until_the_new_stands(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    (target / "stale.txt").write_text("not in the new one")
    with publish(target, kind="test", made_from={}, replace=True) as folder:
        (folder / "a.txt").write_text("new")
        assert (target / "a.txt").read_text() == "old"
    verify(target)
    assert names(target) == ["a.txt", "manifest.json"]
    assert (target / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_a_failed_replacement_keeps_the_old(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    with (
        pytest.raises(ZeroDivisionError),
        publish(target, kind="test", made_from={}, replace=True) as folder,
    ):
        (folder / "a.txt").write_text(str(1 / 0))
    verify(target)
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_replacement_whose_last_rename_fails_keeps_the_old(start: Start, tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    _, errors = start(REPLACER, target, "fail").communicate()
    assert "No space left" in errors
    assert target.is_dir(), f"neither the old nor the new stands, only {names(tmp_path)}"
    verify(target)
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_rename_that_the_device_does_not_take_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    target = make(tmp_path / "out") if replace else tmp_path / "out"
    seen: list[list[str]] = []

    def no_space(path: Path) -> None:
        if path == tmp_path:
            seen.append(names(tmp_path))
            raise OSError(28, "No space left on device")
        fsync_path(path)

    monkeypatch.setattr("finebridge.storage.publish.fsync_path", no_space)
    with pytest.raises(OSError, match="No space left"):
        make(target, "new", replace=replace)
    assert len(seen[0]) == 1 + replace, "the old one is still there while it is not known that the new one will last"
    assert names(tmp_path) == ["out"] * replace
    if replace:
        assert verify(target)["made_from"] == {"from": "old"}


def test_a_replacement_killed_at_its_last_rename_loses_and_leaks_nothing(start: Start, tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    child = start(REPLACER, target, "kill")
    child.wait()
    kept = [path for path in tmp_path.iterdir() if (path / "a.txt").read_text() == "old"]
    assert kept, "the old artifact is gone before the new one stands"
    make(target, "newer", replace=True)
    assert names(tmp_path) == ["x"], "the next writer of a target removes what a killed one left"


def test_a_killed_writer_leaves_only_a_hidden_folder_that_no_reader_trusts(start: Start, tmp_path: Path) -> None:
    good = make(tmp_path / "checkpoint-1")
    kill_inside(start, tmp_path / "checkpoint-2")
    (left,) = set(names(tmp_path)) - {"checkpoint-1"}
    assert left.startswith(".checkpoint-2.tmp-")
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        verify(tmp_path / left)
    assert steps(tmp_path) == [(1, good)]
    assert newest_verified(tmp_path) == (good, [])


def test_the_next_stage_removes_what_a_killed_writer_left(start: Start, tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    kill_inside(start, target)
    assert len(names(tmp_path)) == 2
    assert (target / "a.txt").read_text() == "old"
    staging = stage(target)
    assert names(tmp_path) == sorted([staging.name, "x"])
    assert names(staging) == []


def test_what_a_killed_writer_left_is_found_whatever_the_targets_name(start: Start, tmp_path: Path) -> None:
    target = tmp_path / "model[v2]"
    kill_inside(start, target)
    make(target)
    assert names(tmp_path) == ["model[v2]"]


def test_the_staging_folder_of_a_living_owner_stays(start: Start, tmp_path: Path) -> None:
    child = start(WRITER, tmp_path / "x")
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n"
    (theirs,) = names(tmp_path)
    stage(tmp_path / "x").rmdir()
    assert names(tmp_path) == [theirs]
    child.communicate("go on\n")
    assert child.returncode == 0
    verify(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_staging_folders_of_other_targets_and_other_hosts_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    _, place, _, start = me().rsplit("-", 3)
    here = f"{socket.gethostname()}-{place}-{dead.pid}-{start}-0123abcd"
    mine, other, neighbour = f".x.tmp-{here}", f".x.tmp-elsewhere-n-{dead.pid}-1-0123abcd", f".x-10.tmp-{here}"
    for name in (mine, other, neighbour):
        (tmp_path / name).mkdir()
    stage(tmp_path / "x").rmdir()
    assert names(tmp_path) == sorted([other, neighbour])


def test_what_this_machine_left_before_it_was_started_again(tmp_path: Path) -> None:
    """Nobody can tell its writer from a container of the same name, which would go on writing: so it must be still."""
    old = tmp_path / f".x.tmp-{socket.gethostname()}-0123n1-77-88-0123abcd"
    old.mkdir()
    stage(tmp_path / "x").rmdir()
    assert names(tmp_path) == [old.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finebridge.storage.publish._STILL", -1.0)
        stage(tmp_path / "x").rmdir()
    assert names(tmp_path) == []


def test_published_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with publish(tmp_path / "x", kind="test", made_from={}) as folder:
            os.close(os.open(folder / "private.bin", os.O_CREAT | os.O_WRONLY, 0o600))
            (folder / "run.sh").touch()
            (folder / "run.sh").chmod(0o700)
        os.umask(0o077)
        with publish(tmp_path / "y", kind="test", made_from={}) as folder:
            (folder / "private.bin").touch()
        assert os.umask(0o077) == 0o077, "publishing must not change the umask"
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()}
    assert modes == {"private.bin": 0o644, "run.sh": 0o744, "manifest.json": 0o644}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "y").iterdir()} == {0o600}
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755


def test_commit_without_replace_refuses_an_existing_target_and_keeps_the_staging(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    staging = stage(target)
    (staging / "a.txt").write_text("new")
    with pytest.raises(FileExistsError):
        commit(staging, target, kind="test", made_from={})
    assert (target / "a.txt").read_text() == "old"
    assert (staging / "a.txt").read_text() == "new"


def test_write_text_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_text(path, "one")
    write_text(path, "zwei ä")
    assert path.read_text(encoding="utf-8") == "zwei ä"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "zwei ä"
    assert names(tmp_path) == ["state.json"]
