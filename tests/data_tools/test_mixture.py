"""Mixtures: what the YAML file may say, and which samples training gets of it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.batches import StepBatches, Window, epoch_order
from finebridge.data_tools.build import main as build
from finebridge.data_tools.mixture import mixture_file, read_mixture
from finebridge.data_tools.mixture_dataset import MixtureDataset, RepackedDataset, in_packs
from finebridge.data_tools.mixture_index import prepare_mixture
from finebridge.data_tools.packing import pack
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.schema import DataError
from finebridge.data_tools.tokenizer_files import TokenizerSource
from finebridge.finetune.cli import main
from finebridge.storage.manifest import verify
from finebridge.train.arguments import parse

EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"
SOURCE = TokenizerSource(str(EXAMPLE))
SIZES = {"a": 20, "b": 7, "c": 12}
MIX = """seed: 3
categories:
  math: 0.3
  small: {ratio: 2.5, max_samples: 16}
sources:
  a: {path: a.jsonl, category: math}
  b: {path: b.jsonl, category: small}
  c: {path: c.jsonl}
"""


def chat(name: str, number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"{name} {number}+1="},
        {"role": "assistant", "content": "!" * (1 + number % 5)},
    ]
    return {"messages": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files and the mixture of them; c has a row of a's, which only --deduplicate minds."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        rows = [chat(name, number) for number in range(size)]
        if name == "c":
            rows[4] = chat("a", 2)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mix.yaml").write_text(MIX)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Open = Callable[..., MixtureDataset]


@pytest.fixture(scope="module")
def opened(folder: Path, cache: Path) -> Open:
    """The samples of a mixture of these sources."""

    def make(text: str = MIX, limit: int = 2048, **flags: Any) -> MixtureDataset:
        file = folder / "try.yaml"
        file.write_text(text)
        args = DataArguments(max_seq_length=limit, **flags)
        made = prepare_mixture(file, SOURCE, args, cache, lambda _: None, "fork", "chat")
        return MixtureDataset(made, limit, say=lambda _: None)

    return make


def names(data: MixtureDataset, epoch: int = 0) -> Counter[str]:
    """The samples of an epoch as a.jsonl:3."""
    return Counter(Path(data.name_of(epoch * len(data) + number)).name for number in range(len(data)))


def of(found: Counter[str], source: str) -> dict[str, int]:
    return {name: count for name, count in found.items() if name.startswith(f"{source}.")}


# ---- the YAML file


def test_what_it_says(folder: Path) -> None:
    mixture = read_mixture(folder / "mix.yaml")
    assert (mixture.seed, mixture.reshuffle) == (3, False)
    assert [(s.name, str(s.ratio), s.max_samples, s.category) for s in mixture.sources] == [
        ("a", "3/10", None, "math"), ("b", "5/2", 16, "small"), ("c", "1", None, None)]  # fmt: skip
    assert mixture.sources[1].where == f"{folder / 'mix.yaml'}:7"
    assert mixture_file("data.jsonl") is None


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", 1, "empty"),
        ("- a\n", 1, "names with a colon"),
        ("seed: 1\n", 1, "no sources"),
        ("sources:\n  a: {path: a.jsonl\n", 3, "not YAML"),
        ("sources: {}\n", 1, "none is named"),
        ("sources:\n  a: {path: a.jsonl, ratoi: 2}\n", 2, "unknown key 'ratoi'; did you mean 'ratio'?"),
        ("source:\n  a: {path: a.jsonl}\n", 1, "unknown key 'source'; did you mean 'sources'?"),
        ("sources:\n  a: {path: a.jsonl, ratio: -0.1}\n", 2, "ratio -0.1: a number from 0 on"),
        ("sources:\n  a:\n    path: a.jsonl\n    ratio: .nan\n", 4, "ratio .nan"),
        ("sources:\n  a: {path: a.jsonl, ratio: .inf}\n", 2, "ratio .inf"),
        ("sources:\n  a: {path: a.jsonl, ratio: many}\n", 2, "ratio many"),
        ("sources:\n  a: {path: a.jsonl, ratio: 1/0}\n", 2, "ratio 1/0"),
        ("sources:\n  a: {path: a.jsonl, ratio: [1]}\n", 2, "ratio: a text is expected"),
        ("sources:\n  a: {path: a.jsonl, max_samples: 0}\n", 2, "max_samples 0: a whole number from 1 on"),
        ("sources:\n  a: {path: a.jsonl, max_samples: 1.5}\n", 2, "max_samples 1.5"),
        ("sources:\n  a: {ratio: 1}\n", 2, "'a' has no path"),
        ("sources:\n  a: {path: no.jsonl}\n", 2, "no.jsonl"),
        ("sources:\n  a: {path: 'a.jsonl,b.jsonl'}\n", 2, "several paths are a list"),
        ("sources:\n  a: {path: mix.yaml}\n", 2, "this kind of file is not read"),
        ("sources:\n  a: {path: a.jsonl}\n  a: {path: b.jsonl}\n", 3, "'a' stands in line 2 already"),
        ("sources:\n  a: {path: a.jsonl}\n  z: {path: ./a.jsonl}\n", 3, "belongs to the source 'a'"),
        ("sources:\n  a: {path: [a.jsonl, ./a.jsonl]}\n", 2, "belongs to the source 'a'"),
        ("sources:\n  a: {path: a.jsonl, category: maths}\ncategories: {math: 1}\n", 2, "did you mean 'math'?"),
        ("sources:\n  a: {path: a.jsonl, category: x}\n", 2, "no category 'x' (known: none)"),
        ("categories:\n  math: -3\nsources:\n  a: {path: a.jsonl, category: math}\n", 2, "ratio -3"),
        ("categories:\n  math: {path: a.jsonl}\nsources:\n  a: {path: a.jsonl}\n", 2, "unknown key 'path'"),
        ("sources:\n  a: {path: a.jsonl, ratio: 0}\n", 2, "every source has the ratio 0"),
        ("sources:\n  ../a: {path: a.jsonl}\n", 2, "a name has letters"),
        ("seed: -1\nsources:\n  a: {path: a.jsonl}\n", 1, "seed -1"),
        ("seed: 9223372036854775808\nsources:\n  a: {path: a.jsonl}\n", 1, "at most 2**63"),
        ("reshuffle: yes\nsources:\n  a: {path: a.jsonl}\n", 1, "reshuffle yes: true or false"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_work_starts(
    folder: Path, tmp_path: Path, text: str, line: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "bad.yaml"
    file.write_text(text)
    words = ["--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path / "out")]
    assert main(["data", "build", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert f"{file}:{line}: " in error
    assert told in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError):
        read_mixture(file)


@pytest.mark.parametrize("name", ["none.yaml", "binary.yaml"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=name):
        read_mixture(mixture_file(str(tmp_path / name)) or Path())


def test_rows_that_cannot_be_used_name_the_yaml_line_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jsonl").write_text(json.dumps(chat("x", 1)) + "\n{broken\n")
    (folder / "broken.yaml").write_text("sources:\n  c: {path: c.jsonl}\n  x: {path: broken.jsonl}\n")
    words = ["--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path / "out")]
    assert main(["data", "build", str(folder / "broken.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'broken.yaml'}:3: x: 1 of 2 rows are rejected" in error
    assert f"{folder / 'broken.jsonl'}:2: not_json" in error


# ---- which samples


def test_counts_are_exact_and_the_manifest_tells_them(opened: Open) -> None:
    data = opened()
    found = names(data)
    assert len(data) == 6 + 16 + 12
    assert [sum(of(found, name).values()) for name in SIZES] == [6, 16, 12]
    assert set(of(found, "a").values()) == {1}
    assert sorted(of(found, "b").values()) == [2] * 5 + [3] * 2
    statistics = verify(data.folder)["made_from"]["statistics"]
    assert [(part["name"], part["rows"], part["eligible"], part["taken"]) for part in statistics] == [
        ("a", 20, 20, 6), ("b", 7, 7, 16), ("c", 12, 12, 12)]  # fmt: skip
    assert statistics[0]["tokens"] > 0


def test_sweep_of_ratios(opened: Open) -> None:
    for ratio, limit, wanted in (
        ("0.1", 99, 2), ("0.125", 99, 3), ("0.99", 99, 20), ("1.02", 99, 20), ("3.3", 99, 66), ("3.3", 21, 21),
    ):  # fmt: skip
        data = opened(f"sources:\n  a: {{path: a.jsonl, ratio: {ratio}, max_samples: {limit}}}\n")
        assert len(data) == wanted
        assert max(names(data).values()) - min(names(data).values()) <= 1


def test_other_sources_change_nothing(opened: Open) -> None:
    before = names(opened())
    fewer = names(opened(MIX.replace("  c: {path: c.jsonl}\n", "")))
    for name in ("a", "b"):
        assert of(fewer, name) == of(before, name)
    assert of(names(opened(MIX.replace("seed: 3", "seed: 4"))), "a") != of(before, "a")
    wider = names(opened(MIX.replace("math: 0.3", "math: 0.6")))
    assert of(before, "a").items() <= of(wider, "a").items()
    assert of(wider, "b") == of(before, "b")


def test_nothing_is_tokenised_twice(opened: Open, cache: Path) -> None:
    opened()
    before = {path.name for path in cache.iterdir() if (path / "text_document.bin").is_file()}
    opened(MIX.replace("0.3", "0.4").replace("seed: 3", "seed: 9"))
    assert {path.name for path in cache.iterdir() if (path / "text_document.bin").is_file()} == before


@pytest.mark.slow
def test_workers_do_not_matter(opened: Open, tmp_path: Path, folder: Path) -> None:
    one = opened()
    for workers in (2, 5):
        args = DataArguments(preprocessing_num_workers=workers)
        made = prepare_mixture(folder / "mix.yaml", SOURCE, args, tmp_path / str(workers), lambda _: None, "fork")
        assert (made.index / "ranked.npy").read_bytes() == (one.folder / "ranked.npy").read_bytes()
        assert MixtureDataset(made, 2048, say=lambda _: None).key == one.key


def test_a_prepared_dataset_is_a_source(opened: Open, folder: Path, cache: Path) -> None:
    made = prepare([str(folder / "a.jsonl")], SOURCE, DataArguments(), cache, lambda _: None)
    data = opened(f"seed: 3\nsources:\n  a: {{path: {made}, ratio: 0.3}}\n")
    assert of(names(data), "a") == of(names(opened()), "a")
    with pytest.raises(DataError, match=r"try\.yaml:2: a: --deduplicate shapes tokens"):
        opened(f"sources:\n  a: {{path: {made}}}\n", deduplicate=True)


def test_samples_that_are_dropped_are_not_counted(opened: Open) -> None:
    lengths = opened("sources:\n  a: {path: a.jsonl}\n").lengths
    limit = int(np.sort(lengths)[-6])
    data = opened("sources:\n  a: {path: a.jsonl, ratio: 0.5}\n", limit=limit)
    there = int((lengths <= limit).sum())
    assert there < 20
    assert len(data) == (there + 1) // 2
    assert data.lengths.max() <= limit
    with pytest.raises(DataError, match=r"try\.yaml:2: a: every sample is over"):
        opened("sources:\n  a: {path: a.jsonl}\n", limit=3)


def test_what_comes_to_nothing_is_an_error(opened: Open) -> None:
    with pytest.raises(DataError, match=r"try\.yaml:3: b: ratio 0.01 of 7 rows is none"):
        opened("sources:\n  a: {path: a.jsonl}\n  b: {path: b.jsonl, ratio: 0.01}\n")


def test_duplicates_of_an_earlier_source(opened: Open) -> None:
    plain = MIX.replace("  a: {path: a.jsonl, category: math}\n", "  a: {path: a.jsonl, ratio: 0.05}\n")
    data = opened(plain, deduplicate=True)
    assert of(names(data), "c").keys() == {f"c.jsonl:{line}" for line in range(1, 13) if line != 5}
    report = json.loads((data.folder / "report.json").read_text())
    assert [part["rejects"] for part in report["sources"]] == [{}, {}, {"duplicate": 1}]
    entry = json.loads((data.folder / "rejects.jsonl").read_text())
    assert (entry["source"], Path(entry["file"]).name, entry["line"], entry["code"]) == ("c", "c.jsonl", 5, "duplicate")
    assert entry["detail"].endswith("a.jsonl:3")


def test_samples_are_those_of_the_rows(opened: Open) -> None:
    data = opened()
    for number in (0, 5, 6, 20, len(data) - 1):
        item = data[number]
        assert len(item["input_ids"]) == data.lengths[number]
    with pytest.raises(IndexError):
        data[len(data)]


# ---- epochs

AGAIN = MIX.replace("seed: 3", "seed: 3\nreshuffle: true")


def test_each_epoch_draws_on(opened: Open) -> None:
    data = opened(AGAIN)
    assert names(data) == names(opened())  # the first draw is the same
    draws = [of(names(data, epoch), "a") for epoch in range(10)]
    assert not draws[0].keys() & draws[1].keys()
    total = Counter(name for draw in draws for name in draw)
    assert set(total.values()) == {3}  # 10 epochs of 6 of 20 rows
    assert names(data, 7) == names(opened(AGAIN), 7)
    for epoch in range(3):
        numbers = range(epoch * len(data), (epoch + 1) * len(data))
        assert [len(data[number]["input_ids"]) for number in numbers] == data.lengths_of(epoch).tolist()
    assert data.key != opened().key


def batches(data: Any, window: Window, rank: int = 0) -> StepBatches:
    def order(epoch: int) -> Any:
        return epoch_order("random", data.lengths_of(epoch), window.size, 0, epoch)

    cost = getattr(data, "cost", data.lengths)
    return StepBatches(order, cost, window, rank, drop_last=False, cost_of=data.cost_of)


def test_a_resumed_epoch_goes_on_with_the_same_samples(opened: Open) -> None:
    data = opened(AGAIN)
    whole, rest = batches(data, Window(1, 2, 2)), batches(data, Window(1, 2, 2))
    whole.begin(4)
    rest.begin(4, step=3)
    assert list(whole)[6:] == list(rest)
    whole.begin(4)
    numbers = [number for batch in whole for number in batch]
    assert sorted(numbers) == list(range(4 * len(data), 5 * len(data)))
    ranks = [batches(data, Window(2, 1, 2), rank) for rank in (0, 1)]
    for part in ranks:
        part.begin(4)
    both = [number for part in ranks for batch in part for number in batch if number >= 0]
    assert sorted(both) == sorted(numbers)


def test_packs_of_every_epoch_hold_its_samples(opened: Open) -> None:
    data = opened(AGAIN)
    packed = RepackedDataset(data, 48, 0, 3)
    for epoch in range(3):
        held = Counter[str]()
        for number in range(len(packed)):
            item = packed[epoch * len(packed) + number]
            assert item["lengths"].sum() == len(item["input_ids"]) <= 48
            assert len(item["input_ids"]) == packed.lengths_of(epoch)[number]
            held.update(Path(name).name for name in packed.name_of(epoch * len(packed) + number).split(", "))
        assert held == names(data, epoch)


def test_packs_are_cut_in_two_until_there_are_enough() -> None:
    packs = pack(np.arange(1, 40), 64, 0)
    for count in (len(packs), len(packs) + 1, len(packs) + 5, 39):
        cut = in_packs(packs, count)
        assert len(cut) == count
        assert np.diff(cut.offsets).min() >= 1
        assert sorted(cut.samples.tolist()) == list(range(39))


# ---- the verbs


def test_check_shows_every_source(
    folder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    words = [str(folder / "mix.yaml"), "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(cache)]
    assert main(["data", "check", *words, "--deduplicate", "--count", "0", "--json", str(report)]) == 0
    told = capsys.readouterr().out
    assert told.count("\nsource ") == 3
    assert "c: 11 of 11 samples (ratio 1)" in told
    assert "c.jsonl:5: the same as" in told
    figures = json.loads(report.read_text())
    assert figures["checked"]["a"]["samples"] == 20
    assert [part["taken"] for part in figures["sources"]] == [6, 16, 11]


def test_a_mixture_is_no_text_for_pretraining(folder: Path, tmp_path: Path) -> None:
    words = ["--config_name", "qwen3", "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path)]
    with pytest.raises(DataError, match="a mixture is for finebridge sft"):
        parse([*words, "--train_data_file", str(folder / "mix.yaml")], "document")
    with pytest.raises(DataError, match="a mixture is built alone"):
        build([str(folder / "mix.yaml"), "x.jsonl", *words[2:4], "--output_dir", str(tmp_path / "o")])
