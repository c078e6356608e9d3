"""The wheel holds the package, its data and nothing else; the root is the package whatever the checkout is called."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("storage", "ds_configs", "data_tools", "merge", "bridge", "train", "finetune")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files in a folder of another name."""
    copy = tmp_path_factory.mktemp("checkout") / "another name"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    out = copy.parent / "dist"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert all(name.startswith("finebridge/") for name in names)
    assert not [name for name in names if name.endswith("setup.py") or "/tests/" in name or "/benchmarks/" in name]
    tracked = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".json", ".jsonl", ".jinja", ".sh", ".yaml") and "__pycache__" not in path.parts
    }
    tracked -= {name for name in tracked if name.startswith("finetune/example_data/") and name.endswith(".py")}
    assert {name.removeprefix("finebridge/") for name in names} == tracked | {"__init__.py", "py.typed"}


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "train.py").write_text("raise SystemExit('the user has a train.py of their own')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import finebridge.finetune.cli as c, finebridge.train.arguments; print(c.__file__)"],
        cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "finebridge" / "finetune" / "cli.py")
