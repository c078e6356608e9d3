"""The rules of the house that a test can hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {"storage": 0, "ds_configs": 0, "data_tools": 1, "merge": 1, "train": 2, "bridge": 2, "finetune": 3}


def sources() -> list[Path]:
    return [path for room in FLOORS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """Line, room or module, and level of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or node.names[0].name).split(".")[0], node.level
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name.split(".")[0], 0


def test_there_is_something_to_check() -> None:
    assert len(sources()) > 30


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_are_relative(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for line, target, level in imports(path):
        assert target != "finebridge" or level, f"{path}:{line}: import other rooms relatively"
        if level == 2 and target in FLOORS:
            assert FLOORS[target] < FLOORS[room], f"{path}:{line}: {room} may not import {target}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_named_like_a_standard_module(path: Path) -> None:
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


UNSAFE = re.compile(
    r"weights_only\s*=\s*False|pickle\.loads?\(|cPickle|allow_pickle\s*=\s*True|shell\s*=\s*True|os\.system\(|yaml\.load\(|\beval\(|\bexec\("
)


def test_nothing_unsafe_outside_the_safe_loader() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*sources(), ROOT / "setup.py", ROOT / "__init__.py"]
        if path != ROOT / "storage" / "safe_load.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNSAFE.search(line) and not re.search(r"model\.eval\(\)|\.eval\(\)", line)
    ]
    assert not found


def test_the_unsafe_pattern_finds_what_it_should() -> None:
    assert UNSAFE.search("torch.load(path, weights_only=False)")
    assert UNSAFE.search("subprocess.run(command, shell=True)")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


LIGHT = [
    "import finebridge.finetune.cli as c; c.main(['--help'])",
    "import finebridge.finetune.cli as c; assert c.main(['sft', '--lerning_rate', '1']) == 2",
    "import finebridge.finetune.cli as c; assert c.main(['sft', '--model_name_or_path', '/no/where']) == 2",
    "import finebridge.finetune.cli as c; assert c.main(['report', '/no/where']) == 2",
    "import finebridge.finetune.cli as c; assert c.main(['cache', 'list', '/usr/include']) == 0",
    "import finebridge.merge.merge_lora as m; m.parser().format_help()",
    "import finebridge.finetune.cli as c; c.main('merge --base_model_path /no --adapter_model_path a --output_path o'.split())",
]


@pytest.mark.parametrize("code", LIGHT)
def test_the_command_line_is_light(code: str) -> None:
    heavy = "torch", "deepspeed", "transformers", "peft", "pandas"
    assert run(f"{code}\nimport sys; print('LOADED', [m for m in {heavy} if m in sys.modules])").endswith("LOADED []\n")


def test_help_of_a_bad_flag_goes_to_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finebridge.finetune.cli", "sft", "--lerning_rate", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --lerning_rate; did you mean --learning_rate?\n"


def test_every_public_name_has_a_docstring() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_every_parameter_is_annotated() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}({argument.arg})"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert not bare


def test_every_test_asserts() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not re.search(r"\bassert\b|raises\(|\.check\(\)|verify\(|\bassert_|\brefused\(", ast.unparse(node))
    ]
    assert not silent


def test_readme_and_its_chinese_twin_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        return [
            line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()
        ]

    assert commands("README.md")
    assert commands("README.md") == commands("README_CN.md")


def test_readme_shows_every_file_of_the_house() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in sources() if path.name != "__init__.py" and path.name not in readme]
    assert not missing
