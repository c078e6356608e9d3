"""How far a conversion is: what is said of it, what those who wait for it read, and the bar on a terminal."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.convert import Target, convert, plan
from finebridge.bridge.kept import Key, convert_once
from finebridge.bridge.source import Form, Source, open_source
from finebridge.finetune.cli import main
from finebridge.storage import progress
from finebridge.storage.once import locked
from finebridge.storage.publish import publish
from finebridge.storage.threads import usable_cores
from terminals import terminal

Models = Callable[[str], Path]
QUICK = [("hf", "torch_dist"), ("torch_dist", "torch"), ("torch", "hf"), ("hf", "hf")]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line whenever bytes are done, not every ten seconds."""
    monkeypatch.setattr(progress, "EVERY", 0.0)


def shares(said: list[str], what: str, done: str) -> list[int]:
    return [int(found[1]) for line in said if (found := re.match(rf"{what}: (\d+)% of \d+ MB {done}, ", line))]


@pytest.mark.usefixtures("always")
def test_every_form_tells_growing_shares_and_an_end(hf_models: Models, tmp_path: Path) -> None:
    places = {"hf": hf_models("qwen3_tied")}
    for number, (form, to) in enumerate(QUICK):
        said: list[str] = []
        save = tmp_path / str(number)
        with (source := open_source(places[form])).tensors:
            convert(plan(source, Target(to, workers=2)), save, say=said.append)
        places[to] = save
        found = shares(said, "conversion", "written")
        assert len(found) > 10, "one for each tensor"
        assert found == sorted(found)
        assert found[-1] == 100
        assert any(re.match(r"conversion: \d+ MB written in \d+ s", line) for line in said)
        assert (shares(said, "checksums", "read") or [0])[-1] == (100 if number else 0), "of a source with a manifest"


@pytest.mark.usefixtures("always")
def test_those_who_wait_for_a_kept_conversion_read_how_far_it_is(
    hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finebridge.storage.once._BEAT", 0.01)
    half_way, read = threading.Event(), threading.Event()
    heard: list[str] = []

    def say(text: str) -> None:
        if text.startswith("conversion: "):
            half_way.set()
            assert read.wait(60)

    def hear(text: str) -> None:
        heard.append(text)
        if "conversion: " in text:
            read.set()

    def opened() -> Source:
        return open_source(hf_models("qwen3"))

    builder = threading.Thread(
        target=convert_once, args=(opened, Target("torch", workers=1), tmp_path / "x", Key("key", {}), say)
    )
    builder.start()
    assert half_way.wait(60)
    with locked(tmp_path / ".x.lock", hear, every=0.01):
        builder.join()
    told = re.compile(r".*\(waited \d+ s\): conversion: \d+% of \d+ MB written, [\d.]+ MB/s, about \d+ s left")
    assert any(map(told.fullmatch, heard))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts; a shell's background jobs inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_threads_of_a_conversion_that_is_stopped_end_at_their_next_tensor(
    to: Form, hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stopped = open_source(hf_models("qwen3")), threading.Event()
    read, leave = source.tensors.get, progress.Progress.__exit__
    fetched: list[str] = []

    def get(name: str) -> torch.Tensor:
        fetched.append(name)
        if len(fetched) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(60)
        return read(name)

    def exit_(self: progress.Progress, *error: Any) -> None:
        leave(self, *error)
        stopped.set()

    made = plan(source, Target(to, workers=1))
    monkeypatch.setattr(source.tensors, "get", get)
    monkeypatch.setattr(progress.Progress, "__exit__", exit_)
    with source.tensors, pytest.raises(KeyboardInterrupt):
        convert(made, tmp_path / "out", say=lambda _: None)
    assert len(fetched) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_a_bar_on_a_terminal(
    hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with publish(tmp_path / "model", kind="hf", made_from={}) as folder:
        for path in hf_models("qwen3").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    words = ["--to", "mcore", "--ckpt_format", "torch", "--load", tmp_path / "model", "--save", tmp_path / "out"]
    with terminal(monkeypatch) as shown:
        assert main(["convert", *map(str, words)]) == 0
    text = shown.decode()
    for bar in ("checksums ━", "conversion ━"):
        assert bar in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'out'}\n")


def test_cores_that_may_be_used_are_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for cores, threads in (({3}, 1), ({0, 2, 5}, 3), (set(range(64)), 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        assert usable_cores() == Target("hf").workers == threads
        for verb in ("convert", "merge"):
            with pytest.raises(SystemExit):
                main([verb, "--help"])
            assert f"threads (default {threads})" in " ".join(capsys.readouterr().out.split())
