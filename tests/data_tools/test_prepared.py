"""A prepared dataset named in place of raw files: used as it is, held against the flags, refused when it does not fit."""

import shutil
from pathlib import Path

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.prepared import prepared_folder
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.readers import resolve_files
from finebridge.data_tools.schema import DataError
from finebridge.data_tools.tokenizer_files import TokenizerSource
from finebridge.finetune.cli import main
from finebridge.storage.manifest import ManifestError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"
SOURCE = TokenizerSource(str(EXAMPLE))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("prepared")
    return prepare([str(EXAMPLE / "train_lora.jsonl")], SOURCE, DataArguments(think_mode="fast"), cache)


def test_it_is_used_as_it_stands(built: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for args in (DataArguments(think_mode="fast"), DataArguments(), DataArguments(max_seq_length=64)):
        assert prepare([str(built)], SOURCE, args, tmp_path, said.append) == built
    assert all("reused" in line for line in said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (DataArguments(think_mode="slow"), "--think_mode shapes tokens"),
        (DataArguments(mask_compat="hunyuan"), "--mask_compat shapes tokens"),
        (DataArguments(over_long="split_turns"), "--over_long shapes tokens"),
        (DataArguments(chat_template="hunyuan_a13b"), "--chat_template shapes tokens"),
        (DataArguments(data_format="messages"), "--data_format tells how raw rows are read"),
    ],
)
def test_flags_that_would_have_made_other_tokens(built: Path, tmp_path: Path, args: DataArguments, told: str) -> None:
    with pytest.raises(DataError, match=told):
        prepare([str(built)], SOURCE, args, tmp_path)


def test_another_tokenizer(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(EXAMPLE, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(DataError, match="made with another tokenizer"):
        prepare([str(built)], TokenizerSource(str(other)), DataArguments(), tmp_path)


def test_a_damaged_one(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(built, folder)
    (folder / "text_document.bin").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"text_document\.bin"):
        prepare([str(folder)], SOURCE, DataArguments(), tmp_path)


def test_it_stands_alone(built: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name it alone"):
        prepared_folder([str(built), "more.jsonl"])
    with pytest.raises(DataError, match="is a prepared dataset; name it alone"):
        resolve_files([str(built.parent)])
    assert prepared_folder([str(tmp_path)]) is None


def test_imported_files_can_be_trained_on_when_their_ids_fit(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "export", str(built), "--layout", "mindspeed", "--output_prefix", str(tmp_path / "m")]) == 0
    assert (
        main(["data", "import", str(tmp_path / "m"), "--layout", "mindspeed", "--output_dir", str(tmp_path / "i")]) == 0
    )
    assert prepare([str(tmp_path / "i")], SOURCE, DataArguments(), tmp_path, wanted="chat") == tmp_path / "i"
    assert main(["data", "check", str(tmp_path / "i"), "--tokenizer_name_or_path", str(EXAMPLE), "--count", "0"]) == 0
    capsys.readouterr()
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "small")
    small = TokenizerSource(str(tmp_path / "small"))
    with pytest.raises(DataError, match="the vocabulary has 2"):
        prepare([str(tmp_path / "i")], small, DataArguments(), tmp_path)


def test_rows_of_another_kind_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(DataError, match="plain text for pretraining; conversations are needed"):
        prepare([str(tmp_path / "t.jsonl")], SOURCE, DataArguments(), tmp_path / "cache", wanted="chat")
    assert not (tmp_path / "cache").exists()
