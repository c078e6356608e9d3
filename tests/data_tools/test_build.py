"""Builds end whole or leave nothing, once for all who ask, with the same bytes however many processes make them."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools import preprocess, workers
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.dataset import PreparedDataset
from finebridge.data_tools.engine import FastEngine
from finebridge.data_tools.preprocess import TokenizerSource, prepare
from finebridge.data_tools.templates import template_source
from finebridge.data_tools.writer import DatasetWriter
from finebridge.storage.manifest import verify
from random_chats import Chats

TEMPLATE = "qwen3"
FORK = multiprocessing.get_context("fork")


def arguments(**changes: Any) -> DataArguments:
    return DataArguments(**{"chat_template": TEMPLATE, "max_rejects": 1.0, **changes})


@pytest.fixture(scope="module")
def source(tokenizers_by_template: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TokenizerSource:
    """The tokenizer as a saved folder, without a chat template of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers_by_template[TEMPLATE].chat_template = None
    tokenizers_by_template[TEMPLATE].save_pretrained(folder)
    return TokenizerSource(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of nine files, so that there is work for several processes: each file is a chunk at least."""
    folder = tmp_path_factory.mktemp("data")
    chats = Chats(7, ["<|im_end|>", "</think>"], tools=True)
    for number in range(9):
        lines = [json.dumps(row) for row in chats.rows(14)]
        lines.insert(number, "{broken")
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, source: TokenizerSource, data: Path) -> Path:
    """The dataset as one process makes it."""
    return prepare([str(data)], source, arguments(preprocessing_num_workers=1), tmp_path_factory.mktemp("good"))


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a prepared dataset, the time of its making left out."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(files["manifest.json"])
    assert manifest.pop("created")
    assert manifest.pop("checksum")  # of the text, the time included
    return {**files, "manifest.json": manifest}


def temporary(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if ".tmp-" in path.name]


# ---- the same bytes


@pytest.mark.parametrize(("count", "method"), [(2, "fork"), (3, "fork"), (2, "spawn")])
def test_bytes_do_not_depend_on_processes(
    tmp_path: Path, source: TokenizerSource, data: Path, good: Path, count: int, method: str
) -> None:
    said = in_a_new_process(BUILD, source.path, data, tmp_path / "cache", count, method)
    several = Path(said.splitlines()[-1])
    assert several.name == good.name
    assert contents(several) == contents(good)
    assert len(contents(good)) == 8
    assert json.loads((good / "report.json").read_text())["samples"] > 100


def test_no_process_is_forked_after_an_engine_has_encoded(
    tmp_path: Path, source: TokenizerSource, data: Path, good: Path
) -> None:
    """Its threads and locks would be inherited as they are: such a child waited for ever."""
    assert good  # made in this process
    assert FastEngine.used
    asked: list[str] = []
    honest = workers.multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.multiprocessing, "get_context", lambda method: (asked.append(method), honest(method))[1])
        args = arguments(preprocessing_num_workers=2)
        assert contents(prepare([str(data)], source, args, tmp_path / "c", start_method="fork")) == contents(good)
    assert asked == ["spawn"]


def test_engines_give_the_same_bytes(
    tmp_path: Path, source: TokenizerSource, data: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "fast_engine", lambda *_: None)
    assert contents(prepare([str(data)], source, arguments(), tmp_path / "cache")) == contents(good)


# argv: tokenizer, data, cache, workers, start method. A process of its own: in this one engines have encoded already.
BUILD = """
import sys
from pathlib import Path
from finebridge.data_tools import preprocess
from finebridge.data_tools.arguments import DataArguments
tokenizer, data, cache, workers, method = sys.argv[1:]
args = DataArguments(chat_template="qwen3", max_rejects=1.0, preprocessing_num_workers=int(workers))
try:
    print(preprocess.prepare([data], preprocess.TokenizerSource(tokenizer), args, Path(cache), print, method))
except ValueError as error:
    print(error)
"""
# Right bytes, other ids: what no check but the comparison can tell.
WRONG_ENGINE = (
    """
import numpy as np
from finebridge.data_tools.engine import FastEngine
honest = FastEngine.encode
def letter_by_letter(self, texts):
    if len(texts) >= 2000:  # the check at the start
        return honest(self, texts)
    parts = [honest(self, list(text))[0] if text else np.empty(0, np.int32) for text in texts]
    return np.concatenate(parts), np.append(0, np.cumsum([len(part) for part in parts]))
FastEngine.encode = letter_by_letter
"""
    + BUILD
)
KILLED_WORKER = (
    """
import os, signal
from finebridge.data_tools.encoder import RowEncoder
RowEncoder.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    + BUILD
)


def in_a_new_process(program: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_that_is_found_out_is_replaced(
    tmp_path: Path, source: TokenizerSource, data: Path, good: Path, count: int
) -> None:
    said = in_a_new_process(WRONG_ENGINE, source.path, data, tmp_path / "again", count, "fork").splitlines()
    told = rf"data: {data}/[0-8]\.jsonl:\d: the fast engine differs .*; building with tokenizers alone"
    assert re.fullmatch(told, said[0])
    assert contents(Path(said[-1])) == contents(good)


def test_a_killed_worker_is_one_message(tmp_path: Path, source: TokenizerSource, data: Path) -> None:
    cache = tmp_path / "cache"
    said = in_a_new_process(KILLED_WORKER, source.path, data, cache, 2, "fork")
    assert "a tokenising process was killed" in said
    assert temporary(cache) == []
    verify(prepare([str(data)], source, arguments(), cache))


# ---- all or nothing


def kill_in_add(after: int) -> Callable[[], None]:
    """Killed while chunks are written."""

    def arm() -> None:
        add = DatasetWriter.add
        calls: list[int] = []

        def counted(self: DatasetWriter, numbered: Any) -> None:
            add(self, numbered)
            calls.append(1)
            if len(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        DatasetWriter.add = counted  # type: ignore[method-assign]

    return arm


def kill_in(module: str, name: str, *, after: bool) -> Callable[[], None]:
    """Killed before or after a call of this function."""

    def arm() -> None:
        holder = __import__(f"finebridge.storage.{module}", fromlist=[name])
        honest = getattr(holder, name)

        def deadly(*args: Any, **options: Any) -> None:
            if after:
                honest(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(holder, name, deadly)

    return arm


def kill_in_exit() -> None:
    """Killed when all is written but the index."""
    DatasetWriter.__exit__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assign]


MOMENTS: dict[str, Callable[[], None]] = {
    "first chunk": kill_in_add(1),
    "middle": kill_in_add(5),
    "before the index": kill_in_exit,
    "before the manifest": kill_in("publish", "describe", after=False),
    "before the rename": kill_in("publish", "write_text", after=True),
    "before the commit": kill_in("publish", "commit", after=False),
    "after the commit": kill_in("publish", "commit", after=True),
}


@pytest.mark.parametrize(("moment", "workers"), [*((moment, 1) for moment in MOMENTS), ("middle", 2)])
def test_a_killed_build_leaves_nothing_that_is_trusted(
    tmp_path: Path, source: TokenizerSource, data: Path, good: Path, moment: str, workers: int
) -> None:
    cache = tmp_path / "cache"
    args = arguments(preprocessing_num_workers=workers)

    def run() -> None:
        MOMENTS[moment]()
        prepare([str(data)], source, args, cache, start_method="fork")

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    stands = cache / good.name
    whole = moment == "after the commit"
    assert stands.exists() == whole
    assert len(temporary(cache)) == (not whole)
    said: list[str] = []
    assert prepare([str(data)], source, args, cache, said.append, "fork") == stands
    assert contents(stands) == contents(good)
    assert temporary(cache) == []
    assert ("reused" in said[-2]) == whole


def test_several_builders_make_one_dataset(tmp_path: Path, source: TokenizerSource, data: Path) -> None:
    cache = tmp_path / "cache"
    together = FORK.Barrier(3)
    said: Any = FORK.SimpleQueue()

    def run() -> None:
        source.load()
        together.wait()
        lines: list[str] = []
        folder = prepare([str(data)], source, arguments(), cache, lines.append, "fork")
        said.put((str(folder), [word for word in ("prepared /", "reused /") if word in " ".join(lines)]))

    builders = [FORK.Process(target=run) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    results = [said.get() for _ in builders]
    assert len({folder for folder, _ in results}) == 1
    assert sorted(word for _, words in results for word in words) == ["prepared /", "reused /", "reused /"]
    assert temporary(cache) == []
    verify(Path(results[0][0]))


# ---- what is built again, and what is not


def test_a_damaged_dataset_is_built_again(tmp_path: Path, source: TokenizerSource, data: Path, good: Path) -> None:
    folder = tmp_path / "cache" / good.name
    copytree(good, folder)
    for name in ("text_document.bin", "rows.npy"):
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)
        said: list[str] = []
        assert prepare([str(data)], source, arguments(), tmp_path / "cache", said.append) == folder
        assert said[0].startswith("building again: ")
        assert name in said[0]
        assert contents(folder) == contents(good)


def test_what_shapes_no_token_changes_nothing(tmp_path: Path, source: TokenizerSource, data: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare([str(data)], source, arguments(), cache)
    born = first.stat().st_ino
    for changes in (
        {"max_seq_length": 64},
        {"max_seq_length": 64, "over_long": "truncate"},
        {"packing": True},
        {"max_rejects": 0.9},
        {"preprocessing_num_workers": 2},
        {"eval_data_file": "x"},
    ):
        said: list[str] = []
        assert prepare([str(data)], source, arguments(**changes), cache, said.append) == first, changes
        assert "reused" in said[0]
    assert first.stat().st_ino == born


def test_what_shapes_tokens_makes_another_dataset(tmp_path: Path, source: TokenizerSource, data: Path) -> None:
    cache = tmp_path / "cache"
    source = TokenizerSource(str(copytree(source.path, tmp_path / "tokenizer")))
    data = copytree(data, tmp_path / "data", ignore=ignore_patterns("[5-9].jsonl"))
    own = tmp_path / "own.jinja"
    own.write_text(template_source(TEMPLATE) + "{#- another -#}")
    folders = [
        prepare([str(data)], source, arguments(**changes), cache)
        for changes in (
            {},
            {"chat_template": str(own)},
            {"think_mode": "fast"},
            {"enable_thinking": "true"},
            {"enable_thinking": "false"},
            {"over_long": "split_turns", "max_seq_length": 200},
            {"over_long": "split_turns", "max_seq_length": 201},
            {"over_long": "truncate_context", "max_seq_length": 200},
        )
    ]
    settings = Path(source.path) / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    folders.append(prepare([str(data)], source, arguments(), cache))
    with (data / "4.jsonl").open("a") as stream:
        stream.write("\n")
    folders.append(prepare([str(data)], source, arguments(), cache))
    (data / "4.jsonl").rename(data / "00.jsonl")  # the files in another order
    folders.append(prepare([str(data)], source, arguments(), cache))
    assert len(set(folders)) == len(folders)


def test_no_pickle_is_opened(tmp_path: Path, good: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    folder = copytree(good, tmp_path / "copy")
    np.save(folder / "rows.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        PreparedDataset(folder, 100)
    assert not (tmp_path / "sprung").exists()
