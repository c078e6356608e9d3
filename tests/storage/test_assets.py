"""What lies beside the weights is carried, and nothing else."""

import json
from pathlib import Path

import pytest
from finebridge.storage.assets import carry, is_asset, is_tokenizer_asset, read_json

CARRIED = [
    "LICENSE", "added_tokens.json", "chat_template.jinja", "config.json", "configuration_tiny.py",
    "generation_config.json", "merges.txt", "modeling_tiny.py", "preprocessor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
]  # fmt: skip
LEFT = [
    ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "events.out.tfevents.1",
    "latest", "manifest.json", "model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json",
    "optimizer.pt", "pytorch_model.bin", "pytorch_model.bin.index.json", "rejects.jsonl", "rng_state_0.pth",
    "scheduler.pt", "tf_model.h5", "trainer_state.json", "training_args.bin", "zero_to_fp32.py",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (*CARRIED, *LEFT):
        (folder / name).write_text("{}" if name.endswith(".json") else f"source {name}")
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "zero_pp_rank_0.pt").touch()
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_every_asset_is_carried_and_no_weight_or_state(source: Path, target: Path) -> None:
    assert carry(source, target) == CARRIED
    assert sorted(path.name for path in target.iterdir()) == CARRIED
    assert (target / "modeling_tiny.py").read_text() == "source modeling_tiny.py"


def test_nothing_is_overwritten(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "modeling_tiny.py"):
        (target / name).write_text("mine")
    assert carry(source, target) == [name for name in CARRIED if name not in ("tokenizer.json", "modeling_tiny.py")]
    assert (target / "tokenizer.json").read_text() == "mine"
    assert (target / "modeling_tiny.py").read_text() == "mine"
    assert carry(source, target) == []


def test_names_to_skip_are_skipped(source: Path, target: Path) -> None:
    assert carry(source, target, skip=set(CARRIED) - {"vocab.json"}) == ["vocab.json"]


def test_auto_map_is_carried_into_a_config_that_the_writer_made(source: Path, target: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    (source / "config.json").write_text(json.dumps({"auto_map": auto_map, "hidden_size": 1}))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    (target / "config.json").write_text(json.dumps({"hidden_size": 2, "name": "ä"}))
    carry(source, target)
    assert read_json(target / "config.json") == {"hidden_size": 2, "name": "ä", "auto_map": auto_map}
    assert read_json(target / "tokenizer_config.json") == {"auto_map": {"AutoTokenizer": ["t.T", None]}}


def test_an_auto_map_that_the_target_has_stays(source: Path, target: Path) -> None:
    (source / "config.json").write_text('{"auto_map": {"AutoConfig": "theirs.C"}}')
    (target / "config.json").write_text('{"auto_map": {"AutoConfig": "mine.C"}}')
    carry(source, target)
    assert (target / "config.json").read_text() == '{"auto_map": {"AutoConfig": "mine.C"}}'


def test_every_chat_template_of_a_tokenizer_is_carried(source: Path, target: Path) -> None:
    """transformers keeps named templates (tool_use, rag) in a folder of their own, source: its CHAT_TEMPLATE_DIR."""
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    carry(source, target)
    assert (target / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_folders_are_no_assets(source: Path) -> None:
    assert not is_asset(source / "global_step5")
    assert not is_asset(source / "absent.json")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tokenizer.json", True), ("tokenizer_config.json", True), ("tokenizer.model", True), ("vocab.json", True),
        ("merges.txt", True), ("qwen.tiktoken", True), ("chat_template.jinja", True), ("special_tokens_map.json", True),
        ("config.json", False), ("generation_config.json", False), ("modeling_tiny.py", False),
    ],
)  # fmt: skip
def test_which_files_are_the_tokenizers(name: str, *, wanted: bool) -> None:
    assert is_tokenizer_asset(name) is wanted


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "a JSON object"), ('{"a": "\udcff"}', "not JSON")]
)
def test_json_that_is_no_object_is_refused_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"c\.json: .*{message}"):
        read_json(tmp_path / "c.json")
