"""Text for pretraining: the tokens that Megatron-LM's own ``tools/preprocess_data.py`` writes, all of them with loss."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.formats import RowForm
from finebridge.data_tools.indexed import IndexedReader
from finebridge.data_tools.preprocess import TokenizerSource, prepare
from finebridge.data_tools.schema import DataError
from random_chats import WORDS, Chats, both_ways, encode_rows

TEXTS = ["some words", "def f():\n    return 1\n", " 的一是不了 ", "x" * 300, "\n", "e\u0301 😀", "don't\r\n\r\n"]


def rows_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


@pytest.fixture
def source(tmp_path: Path, tokenizers_by_template: dict[str, Any]) -> TokenizerSource:
    tokenizers_by_template["qwen3"].save_pretrained(tmp_path / "tokenizer")
    return TokenizerSource(str(tmp_path / "tokenizer"))


@pytest.mark.parametrize("append_eod", [False, True])
def test_the_file_is_megatrons(tmp_path: Path, source: TokenizerSource, append_eod: bool) -> None:
    """What its Encoder does, in two lines: ids of the text, the end token when asked for; documents one after the other."""
    tokenizer = source.load()
    texts = [text for text in TEXTS if text.strip()]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(texts)))
    folder = prepare([str(file)], source, DataArguments(append_eod=append_eod), tmp_path / "cache")
    documents = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * append_eod for text in texts]
    assert (folder / "text_document.bin").read_bytes() == np.concatenate(documents).astype("<i4").tobytes()
    reader = IndexedReader(folder / "text_document")
    assert [len(reader[number]) for number in range(len(reader))] == [len(ids) for ids in documents]
    spans = IndexedReader(folder / "spans_document")
    assert [spans[number].tolist() for number in range(len(spans))] == [[0, len(ids)] for ids in documents]
    report = json.loads((folder / "report.json").read_text())
    assert report["kind"] == "document"
    assert report["tokens"] == report["loss_tokens"] == sum(map(len, documents))


def test_megatrons_reader_opens_it(tmp_path: Path, source: TokenizerSource) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(["one", "two words"])))
    folder = prepare([str(file)], source, DataArguments(append_eod=True), tmp_path / "cache")
    opened = megatron.IndexedDataset(str(folder / "text_document"))
    mine = IndexedReader(folder / "text_document")
    assert [opened[number].tolist() for number in range(len(opened))] == [mine[number].tolist() for number in range(2)]


def test_begin_and_end_tokens_of_the_tokenizer_stand_around_each_document() -> None:
    """As Llama's post-processor puts a begin token first; Megatron-LM asks the tokenizer with special tokens too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for append_eod in (False, True):
        made = both_ways(tokenizer, DataArguments(append_eod=append_eod), rows_of(["ab", "c"]), "document", "text")
        wanted = [tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]]
        assert [ids[0] for ids in wanted] == [256, 256]
        assert [sample.ids.tolist() for sample in made.samples()] == [ids + [257] * append_eod for ids in wanted]


def test_any_text(tokenizers_by_template: dict[str, Any]) -> None:
    """As ``tokenizers`` gives it; the name of a control token in it is only text, and decodes to itself."""
    tokenizer = tokenizers_by_template["qwen3"]
    control = sorted(tokenizer.all_special_tokens)
    chats = Chats(31, control)
    texts = [chats.text() for _ in range(400)]
    made = both_ways(tokenizer, DataArguments(), rows_of(texts), "document", "text")
    ids_of_control = set(tokenizer.convert_tokens_to_ids(control))
    hostile = 0
    for line, sample in zip(made.lines.tolist(), made.samples(), strict=True):
        text, ids = texts[line - 1], sample.ids.tolist()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        if any(token in text for token in control):
            hostile += 1
            assert ids_of_control.isdisjoint(ids)
        else:
            assert ids == tokenizer(text)["input_ids"]
    assert hostile > 10
    assert made.neutralised >= hostile
    assert {reject[2] for reject in made.rejects} <= {"empty_text", "private_characters"}


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3"])
def test_real_tokenizers(npm_tokenizer: Callable[[str], Path], name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(npm_tokenizer(name))
    chance = random.Random(5)
    texts = ["".join(chance.choices([*WORDS, *TEXTS, " "], k=chance.randint(1, 30))) for _ in range(150)]
    made = both_ways(tokenizer, DataArguments(append_eod=True), rows_of(texts), "document", "text")
    plain = [line for line in made.lines.tolist() if not any(t in texts[line - 1] for t in tokenizer.get_added_vocab())]
    assert len(plain) > 100
    samples = dict(zip(made.lines.tolist(), made.samples(), strict=True))
    for line in plain:
        assert samples[line].ids.tolist() == [*tokenizer(texts[line - 1])["input_ids"], tokenizer.eos_token_id]


def test_no_end_token_to_append(tokenizers_by_template: dict[str, Any]) -> None:
    from finebridge.data_tools.encoder import RowEncoder
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers_by_template["qwen3"].backend_tokenizer)
    with pytest.raises(DataError, match="--append_eod: the tokenizer has no end-of-text token"):
        RowEncoder(bare, DataArguments(append_eod=True), "document", None)


def test_a_handlers_columns_make_one_document(tokenizers_by_template: dict[str, Any]) -> None:
    from finebridge.data_tools.encoder import RowEncoder
    from finebridge.data_tools.handlers import handler_form

    tokenizer = tokenizers_by_template["qwen3"]
    form = handler_form("StackOverflowPythonPretrainHandler")
    assert isinstance(form, RowForm)
    from random_chats import chunk_of

    row = {"title": "T", "question_body": "Q", "answer_body": "A"}
    made = RowEncoder(tokenizer, DataArguments(), "document", None)(chunk_of([row]), form)
    (sample,) = made.samples()
    assert tokenizer.decode(sample.ids.tolist()) == "In python, T\n### Question:\nQ\n### Response:\nA\n"
    assert encode_rows(RowEncoder(tokenizer, DataArguments(), "document", None), [{"text": ""}], "text").rejects
