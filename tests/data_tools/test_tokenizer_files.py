"""What tells two tokenizers apart."""

from pathlib import Path
from typing import Any

from finebridge.data_tools.tokenizer_files import tokenizer_sha256


def test_a_tokenizers_folder(tmp_path: Path, tokenizers_by_template: dict[str, Any]) -> None:
    """Tokenizer files and templates count, what lies beside them does not; nothing is loaded."""
    tokenizers_by_template["qwen3"].save_pretrained(tmp_path)

    def refuse() -> Any:
        raise AssertionError

    def now() -> str:
        return tokenizer_sha256(str(tmp_path), refuse)

    first = now()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    assert now() == first
    seen = [first]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"):
        with (tmp_path / name).open("a") as stream:
            stream.write(" ")
        seen.append(now())
    assert len(set(seen)) == len(seen)


def test_a_tokenizer_of_the_hub_is_told_by_what_is_loaded(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["chatml"]
    tokenizer.chat_template = "one"
    names = [tokenizer_sha256("owner/name", lambda one=one: one) for one in tokenizers_by_template.values()]
    assert len(set(names)) == len(names)
    before = tokenizer_sha256("owner/name", lambda: tokenizer)
    tokenizer.chat_template = "two"
    assert tokenizer_sha256("owner/name", lambda: tokenizer) != before


def test_code_beside_a_tokenizer_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenization_own.py").write_text("VERSION = 1\n")
    before = tokenizer_sha256(str(tmp_path), lambda: None)
    (tmp_path / "tokenization_own.py").write_text("VERSION = 2\n")
    assert tokenizer_sha256(str(tmp_path), lambda: None) != before
