"""What was built once, as ``finebridge cache`` sees it: real prepared data and conversions, real builders, killed or at work."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import messages_file
from finebridge.finetune.cli import main
from finebridge.finetune.weights import from_megatron
from finebridge.storage import holds
from finebridge.storage.manifest import verify
from finebridge.storage.once import build_once, verify_once
from finebridge.storage.publish import publish

Models = Callable[[str], Path]

# argv: target. Builds half of it, says so, and waits to be killed; or, told to "use" it, uses it until it is killed.
PROCESS = """
import sys, time
from pathlib import Path
from finebridge.storage import once
from finebridge.storage.once import build_once, verify_once
once._BEAT = 0.05
def build(folder, tell):
    (folder / "text_document.bin").write_bytes(bytes(5000))
    tell("half of it")
    while "half" not in (target.parent / f".{target.name}.lock").read_text():
        time.sleep(0.01)
    print("inside", flush=True)
    time.sleep(600)
target = Path(sys.argv[1])
if sys.argv[2] == "use":
    verify_once(target)
    print("inside", flush=True)
    time.sleep(600)
build_once(target, build, kind="dataset", say=lambda text: None)
"""


@pytest.fixture(scope="module")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``output`` with one cache of each kind that a command makes, and an export, which is none."""
    folder = tmp_path_factory.mktemp("made")
    output, model = folder / "output", models("qwen3")
    prepare(folder, model)
    assert main(["convert", "--to", "mcore", "--load", str(model), "--save", str(output / "mcore-3")]) == 0
    from_megatron(output / "mcore-3", None, output / "converted_weights", lambda _: None)
    kept = ["--enable-hf2mg-convert", "--load", str(model), "--mg-cache-dir", str(output / "kept")]
    assert main(["convert", *kept]) == 0
    forget_holds()
    return output


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change; its sources are where they were."""
    return Path(shutil.copytree(made, tmp_path / "output"))


@pytest.fixture
def process() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start PROCESS and wait until it is inside; what still runs when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(target: Path, what: str) -> "subprocess.Popen[str]":
        child = subprocess.Popen([sys.executable, "-c", PROCESS, str(target), what], stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def prepare(folder: Path, model: Path) -> Path:
    """Chats in ``folder``, prepared below its ``output``."""
    chats = folder / "chats.jsonl"
    if not chats.exists():
        messages_file(chats)
    words = [
        str(chats),
        "--tokenizer_name_or_path",
        str(model),
        "--output_dir",
        str(folder / "output" / "prepared_data"),
    ]
    assert main(["data", "build", *words]) == 0
    forget_holds()
    return chats


def forget_holds() -> None:
    """Use nothing any longer: this process lives on, unlike a command."""
    for folder in list(holds._held):
        holds.release(folder)


def listed(capsys: pytest.CaptureFixture[str], *words: Path | str) -> dict[str, dict[str, Any]]:
    """What ``cache list --json`` finds, by the last part of its path."""
    capsys.readouterr()
    assert main(["cache", "list", "--json", *map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(entry["bytes"] for entry in found["found"])
    return {Path(entry["path"]).name: entry for entry in found["found"]}


def prepared_in(output: Path) -> Path:
    """The prepared data of an output folder."""
    return next((output / "prepared_data").glob("*/report.json")).parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_caches_are_listed_and_nothing_else(
    made: Path, output: Path, models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exports, checkpoints, data sets that somebody imported, and what other tools left are not."""
    for name, kind in (("checkpoint-5", "checkpoint"), ("merged-5", "merged"), ("imported", "dataset"), ("e", "hf")):
        with publish(output / name, kind=kind, made_from={"layout": "mindspeed", "files": {}}) as folder:
            (folder / "data").write_text("x")
    (output / ".pid.lock").write_text("123")
    (output / ".other.tmp-1").mkdir()
    (output / ".x.verified").write_text("yes")
    (output / "loop").symlink_to(output)
    prepared = prepared_in(output)
    found = listed(capsys, output, output / "prepared_data")
    kinds = {name: (entry["kind"], entry["state"]) for name, entry in found.items()}
    converted = next((output / "converted_weights").glob("*/config.json")).parent
    assert kinds == {
        prepared.name: ("prepared data", "whole"), converted.name: ("converted weights", "whole"),
        "kept": ("Megatron conversion", "whole"),
    }  # fmt: skip
    assert [entry["detail"] for entry in found.values()] == [""] * 3
    entry = found[prepared.name]
    assert entry["sources"] == [str(made.parent / "chats.jsonl")]
    assert entry["bytes"] == sum(path.stat().st_size for path in prepared.rglob("*"))
    assert str(models("qwen3") / "model.safetensors") in found["kept"]["sources"]
    monkeypatch.chdir(output.parent)
    assert main(["cache", "list"]) == 0
    *_, row, _last, total = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"\S.*KB +\d{{4}}-.* (qwen3|mcore-3|chats.jsonl) +{output}/\S+ +whole", row)
    assert total.startswith("3 found, ")
    monkeypatch.chdir(prepared)
    assert [*listed(capsys)] == [prepared.name], "without ./output it is the current folder"


def test_use_is_noted(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking is no use: neither list nor verify changes what it shows."""
    prepared = prepared_in(output)
    verify_once(prepared)
    forget_holds()
    memory = prepared.with_name(f".{prepared.name}.verified")
    os.utime(memory, (1e9, 1e9))
    assert main(["cache", "verify", str(output)]) == 0
    assert listed(capsys, output)[prepared.name]["used"].startswith("2001-09-")
    assert main(["cache", "prune", "--older_than", "30d", "--dry_run", str(output)]) == 0
    assert f"would remove {prepared} " in capsys.readouterr().out
    verify_once(prepared)
    forget_holds()
    assert main(["cache", "prune", "--older_than", "30d", str(output)]) == 0
    assert capsys.readouterr().out == "removed 0, 0 B; selected and kept: 0\n"
    assert prepared.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "added", "manifest", "flipped"])
def test_damage_is_named_and_pruned(output: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    prepared = prepared_in(output)
    file = prepared / "text_document.bin"
    match damage:
        case "cut":
            os.truncate(file, 100)
        case "missing":
            file.unlink()
        case "added":
            file = prepared / "more"
            file.write_text("x")
        case "manifest":
            file = prepared / "manifest.json"
            file.write_text(file.read_text().replace('"dataset"', '"dataset" '))
        case _:
            assert main(["cache", "verify", str(output)]) == 0
            state = file.stat()
            file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    entry = listed(capsys, output)[prepared.name]
    assert entry["kind"] == "prepared data"
    assert entry["state"] == ("whole" if damage == "flipped" else "damaged")
    assert main(["cache", "verify", str(output)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"damaged: {file}: ")
    assert said.out.count("whole: ") == 2
    (prepared.parent / f".{prepared.name}.recipe.yaml").write_text("{}\n")
    assert main(["cache", "prune", str(output)]) == 0
    assert re.search(rf"removed {prepared} \(.* KB\): damaged: .*{file.name}", capsys.readouterr().out)
    assert names(prepared.parent) == ["source_hashes.json"]
    assert len(listed(capsys, output)) == 2


def test_every_damaged_file_is_named(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_in(output)
    for name in ("text_document.bin", "rows.npy"):
        os.truncate(prepared / name, 10)
    assert main(["cache", "verify", str(prepared)]) == 1
    assert len(re.findall(r"damaged: .*(?:bin|npy): 10 bytes, the manifest says", capsys.readouterr().err)) == 2


def test_a_manifest_that_says_nothing_is_never_removed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_in(output)
    (prepared / "manifest.json").write_text("")
    entry = listed(capsys, output)[prepared.name]
    assert (entry["kind"], entry["state"]) == ("unknown", "damaged")
    assert main(["cache", "prune", "--all", str(prepared.parent)]) == 0
    assert f"kept: {prepared}: " in capsys.readouterr().err
    assert prepared.exists()


def test_a_source_that_has_changed_or_gone(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A touched one is unknown to list, which reads nothing, and compared by verify --sources."""
    chats = prepare(tmp_path, models("qwen3"))
    output = tmp_path / "output"
    name, content = prepared_in(output).name, chats.read_text()

    def state(*words: str) -> tuple[str, str, int]:
        entry = listed(capsys, output)[name]
        return entry["state"], entry["detail"], main(["cache", "verify", "--sources", str(output), *words])

    assert state() == ("whole", "", 0)
    chats.touch()
    assert state() == ("whole", "whether its sources changed is unknown", 0)
    chats.write_text(content.replace("0+0", "0-0", 1))
    assert state() == ("whole", "whether its sources changed is unknown", 1)
    assert f"{chats} has changed" in capsys.readouterr().err
    chats.write_text(content + "\n")
    assert state() == ("stale", f"{chats} has changed", 1)
    chats.unlink()
    assert state() == ("stale", f"{chats} has gone", 1)
    assert main(["cache", "prune", str(output)]) == 0
    assert main(["cache", "prune", "--stale", "--older_than", "1h", str(output)]) == 0
    assert capsys.readouterr().out.endswith("removed 0, 0 B; selected and kept: 0\n" * 2)
    assert main(["cache", "prune", "--stale", str(output)]) == 0
    assert f"stale: {chats} has gone" in capsys.readouterr().out
    assert listed(capsys, output) == {}


def test_an_old_artifact_of_a_source_that_was_prepared_again_is_stale(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = prepare(tmp_path, models("qwen3"))
    old = prepared_in(tmp_path / "output").name
    chats.write_text(chats.read_text().replace("0+0", "0-0", 1))
    prepare(tmp_path, models("qwen3"))
    found = listed(capsys, tmp_path)
    assert {name: entry["state"] for name, entry in found.items()} == {old: "stale"} | dict.fromkeys(
        found.keys() - {old}, "whole"
    )
    assert len(found) == 2


def test_a_builder_at_work_and_what_it_leaves_when_it_is_killed(
    process: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "cache" / "0123"
    builder = process(target, "build")
    (entry,) = listed(capsys, tmp_path).values()
    assert (entry["path"], entry["state"], entry["bytes"]) == (str(target), "being made", 5000)
    assert re.fullmatch(rf"by {builder.pid} on .* since \d{{4}}-.*: half of it", entry["detail"])
    before = names(target.parent)
    assert main(["cache", "prune", "--all", str(tmp_path)]) == 0
    assert f"kept: {target}: being made by {builder.pid}" in capsys.readouterr().err
    assert names(target.parent) == before
    builder.kill()
    builder.wait()
    found = listed(capsys, tmp_path)
    assert {entry["state"] for entry in found.values()} == {"leftover"}
    assert sorted(found) == before
    assert sum(entry["bytes"] for entry in found.values()) > 5000
    assert main(["cache", "prune", "--dry_run", str(tmp_path)]) == 0
    assert names(target.parent) == before
    assert main(["cache", "prune", str(tmp_path)]) == 0
    assert "removed" in capsys.readouterr().out
    assert names(target.parent) == []


def test_what_a_living_process_uses_stays(
    process: Callable[..., "subprocess.Popen[str]"], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_in(output)
    user = process(prepared, "use")
    assert main(["cache", "prune", "--all", str(prepared)]) == 0
    assert capsys.readouterr().err == f"kept: {prepared}: a process that lives uses it\n"
    verify(prepared)
    user.kill()
    user.wait()
    assert main(["cache", "prune", "--all", str(output)]) == 0
    assert listed(capsys, output) == {}
    assert (output / "mcore-3").is_dir()


def test_a_prune_that_is_killed_leaves_leftovers(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, name = output / "prepared_data", prepared_in(output).name
    verify_once(place / name)
    forget_holds()
    code = (
        "import os, sys; from finebridge.finetune.cli import main; from finebridge.storage import publish; "
        "publish.shutil.rmtree = lambda *_, **__: os._exit(9); main(['cache', 'prune', '--all', sys.argv[1]])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(place)], check=False).returncode == 9
    found = listed(capsys, place)
    assert {entry["state"] for entry in found.values()} == {"leftover"}
    assert {name.partition(".tmp-")[0] for name in found} == {f".{name}{end}" for end in ("", ".lock", ".verified")}
    assert main(["cache", "prune", str(place)]) == 0
    assert names(place) == ["source_hashes.json"]


# argv: target. Builds it or finds it built, uses it, lets it go; twenty times.
USER = """
import sys, time
from pathlib import Path
from finebridge.storage import holds
from finebridge.storage.manifest import verify
from finebridge.storage.once import build_once
target, built = Path(sys.argv[1]), 0
def build(folder, tell):
    (folder / "data").write_bytes(bytes(1000))
    return {"sources": [], "tokenizer": ""}
for _ in range(20):
    built += build_once(target, build, kind="dataset", say=lambda text: None)
    for _ in range(3):
        verify(target)
        time.sleep(0.002)
    holds.release(target)
    time.sleep(0.01)
print(built)
"""


def test_who_uses_what_is_pruned_meanwhile_always_finds_it_whole(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "k"
    target.parent.mkdir()
    users = [
        subprocess.Popen([sys.executable, "-c", USER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    while any(user.poll() is None for user in users):
        assert main(["cache", "prune", "--all", str(tmp_path)]) == 0
    said = [user.communicate() for user in users]
    assert [err for _, err in said] == ["", ""]
    assert sum(int(out) for out, _ in said) > 2, "it was pruned and built again"


def test_leftovers_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed build, an artifact that somebody removed by hand, one moved aside, and writers that nobody can ask."""

    def fail(_folder: Path, _tell: Any) -> dict[str, Any]:
        raise ValueError("row 7 is bad")

    with pytest.raises(ValueError, match="row 7"):
        build_once(tmp_path / "failed", fail, kind="dataset")
    (tmp_path / ".failed.failed").rename(tmp_path / ".late.failed")
    os.utime(tmp_path / ".late.failed", (1e9, 1e9))
    with pytest.raises(ValueError, match="row 7"):
        build_once(tmp_path / "failed", fail, kind="dataset")  # its builder lives, so those who wait may need it
    build_once(tmp_path / "gone", lambda folder, _: {"n": (folder / "f").write_text("f")}, kind="dataset")
    shutil.rmtree(tmp_path / "gone")
    child = subprocess.run([sys.executable, "-c", "from finebridge.storage.owner import me; print(me())"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    dead = child.stdout.strip()
    aside, half, far = (
        tmp_path / name
        for name in (f".x.tmp-{dead}-0123abcd.old", f".y.tmp-{dead}-0123abcd", ".z.tmp-elsewhere-0n1-7-7-0123abcd")
    )
    for folder in (aside, half, far):
        folder.mkdir()
    assert sorted(listed(capsys, tmp_path)) == sorted(
        [".late.failed", ".gone.verified", aside.name, half.name, far.name]
    )
    assert main(["cache", "prune", "--leftovers", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "failed: row 7 is bad" in said.out
    assert "puts it back" in said.err
    assert "cannot be asked from here" in said.err
    assert names(tmp_path) == sorted([".failed.failed", aside.name, far.name])


def test_a_lock_of_a_machine_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody can ask whether its owner lives; one that stood still for ten minutes is believed to be dead."""
    lock = tmp_path / ".k.lock"
    lock.write_text(json.dumps({"owner": "far-0n1-7-7", "attempt": "a", "since": "2026-01-01", "told": "9 %"}))
    assert listed(capsys, tmp_path)["k"]["detail"] == "by 7 on far since 2026-01-01: 9 %"
    assert main(["cache", "prune", "--all", str(tmp_path)]) == 0
    assert lock.exists()
    then = time.time() - 700
    os.utime(lock, (then, then))
    assert listed(capsys, tmp_path)[".k.lock"]["state"] == "leftover"
    assert main(["cache", "prune", str(tmp_path)]) == 0
    assert names(tmp_path) == []


def test_a_place_that_is_only_read(output: Path) -> None:
    """Listed and verified; what cannot be removed is said, with exit code 1. Root gives up its right to write everywhere."""
    place = output / "prepared_data"
    prepared = prepared_in(output)
    for folder in (place, prepared):
        folder.chmod(0o555)
    powerless = (
        "import ctypes, os, sys; [ctypes.CDLL(None).prctl(24, right, 0, 0, 0) for right in (1, 2)]; "
        "os.execv(sys.executable, [sys.executable, '-m', 'finebridge.finetune.cli', *sys.argv[1:]])"
    )

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", powerless, "cache", *words, str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 found" in done.stdout
    assert run("verify").returncode == 0
    done = run("prune", "--all")
    assert done.returncode == 1
    assert f"cannot be removed: {place}" in done.stderr
    verify(prepared)
    place.chmod(0o000)
    done = run("list")
    assert f"{place}: not looked into: Permission denied" in done.stderr
    place.chmod(0o755)
    prepared.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cache list|verify|prune"), (["lst"], "cache lst: no such verb; did you mean list?"),
        (["list", "/no/where"], "/no/where: no such folder"), (["list", "--jsn"], "--jsn; did you mean --json?"),
        (["prune", "--oder_than", "3d"], "did you mean --older_than?"),
        (["prune", "--older_than", "3"], "'3'; days or hours are expected"), (["prune", "--older_than"], "expected one"),
    ],
)  # fmt: skip
def test_what_is_not_understood(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
