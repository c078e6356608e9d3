"""Ranks of several machines compare what is installed before they wait for one another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from finebridge.finetune.launch import free_port
from finebridge.storage.installed import differences, installed

RANK = """
import sys
import finebridge.train.meeting as meeting
if sys.argv[1] == "other":
    real = meeting.installed
    meeting.installed = lambda: {**real(), "code": {"train/x.py": "1"}}
from finebridge.train.runtime import RuntimeSetupError
try:
    with meeting.together(print):
        print("worked")
except RuntimeSetupError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("second", ["other", pytest.param("same", marks=pytest.mark.slow)])
def test_machines_that_are_not_alike_do_not_meet(second: str, tmp_path: Path) -> None:
    port = str(free_port(""))
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, second if rank else "same"],
            cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    if second == "same":
        assert [process.returncode for process in processes] == [0, 0], said
        assert said == ["worked\n"] * 2
    else:
        assert [process.returncode for process in processes] == [2, 2], said
        assert "another rank cannot train: rank 1 " in said[0]
        assert "not what rank 0 has: finebridge's files differ: __init__.py" in said[1]


def test_what_is_installed() -> None:
    has = installed()
    assert has == json.loads(json.dumps(has)) == installed()
    assert has["versions"]["finebridge"]
    assert has["versions"]["torch"].startswith("2.")
    assert {"train/meeting.py", "__init__.py", "data_tools/chat_templates/hunyuan_dense.jinja"} <= has["code"].keys()
    assert not [name for name in has["code"] if name.startswith(("tests", "benchmarks", "."))]
    older = {"versions": {**has["versions"], "torch": "2.0", "peft": ""}, "code": has["code"]}
    assert differences(older, has) == [
        f"torch 2.0, not {has['versions']['torch']}", f"peft is not installed, not {has['versions']['peft']}",
    ]  # fmt: skip
