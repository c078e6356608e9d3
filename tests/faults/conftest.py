"""The fault injector, compiled once, and the process that runs trials under it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Trial = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the fault injector needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("inject") / "inject.so"
    source = Path(__file__).with_name("inject.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def trial(injector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """``trial(argv, home, at=K, act="kill" or "enospc")``; with ``rank`` it is a run of two ranks. K = 0 counts."""
    log = tmp_path_factory.mktemp("trials") / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).parents[1] / "fault_trials.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
            env={**os.environ, "LD_PRELOAD": str(injector)},
        )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None

    def ask(argv: list[object], home: Path, **more: Any) -> dict[str, Any]:
        print(json.dumps({"argv": list(map(str, argv)), "home": str(home), **more}), file=child.stdin, flush=True)
        answer = child.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        assert answer, log.read_text()[-3000:]
        return json.loads(answer)

    yield ask
    child.stdin.close()
    child.wait(30)
