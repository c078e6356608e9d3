"""MindSpeed-LLM's handler names and ``--map-keys``: known ones are forms, all others are refused with what to use."""

from dataclasses import replace
from typing import Any

import pytest
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.handlers import HANDLERS, check_columns, handler_form, map_keys
from finebridge.data_tools.schema import DataError, Document, Preference, Sample

USER = {"from": "human", "value": "q"}
ANSWER = {"from": "gpt", "value": "a"}


def texts(row: Any, how: RowForm) -> list[str]:
    result = parse_row(row, how)
    assert isinstance(result, Sample)
    return [f"{message.role}: {message.content}" for message in result.messages]


@pytest.mark.parametrize("name", sorted(HANDLERS))
def test_every_handler_is_a_form_or_says_what_to_use(name: str) -> None:
    if isinstance(HANDLERS[name], RowForm):
        assert handler_form(name) is HANDLERS[name]
        return
    with pytest.raises(DataError, match=f"^--handler-name {name}: .*StyleInstructionHandler"):
        handler_form(name)


def test_an_unknown_handler_is_never_taken_for_another() -> None:
    with pytest.raises(DataError, match="did you mean AlpacaStyleInstructionHandler"):
        handler_form("AlpacaInstructionHandler")
    with pytest.raises(DataError, match="known are GeneralPretrainHandler"):
        handler_form("xyz")


def test_handlers_read_their_rows() -> None:
    row: Any = {"instruction": "i", "input": "n", "output": "o"}
    assert texts(row, handler_form("AlpacaStyleInstructionHandler")) == ["user: i\nn", "assistant: o"]
    row = {"conversations": [{"from": "system", "value": "s"}, USER, ANSWER]}
    for name in ("SharegptStyleInstructionHandler", "HunyuanInstructionHandler"):
        assert texts(row, handler_form(name)) == ["system: s", "user: q", "assistant: a"]
    row = {"title": "t", "question_body": "q", "answer_body": "a"}
    document = parse_row(row, handler_form("StackOverflowPythonPretrainHandler"))
    assert document == Document("In python, t\n### Question:\nq\n### Response:\na\n")


def test_map_keys_renames_columns() -> None:
    alpaca = handler_form("AlpacaStyleInstructionHandler")
    how = map_keys(alpaca, '{"prompt": "question", "query": "", "response": "answer", "system": "sys"}')
    row = {"question": "q", "input": "n", "answer": "a", "sys": "s"}
    assert texts(row, how) == ["system: s", "user: q", "assistant: a"]
    assert alpaca.keys == {}


def test_map_keys_renames_tags() -> None:
    tags = '{"role_tag": "role", "content_tag": "text", "user_tag": "me", "assistant_tag": "you", "function_tag": "do"}'
    how = map_keys(handler_form("SharegptStyleInstructionHandler"), f'{{"messages": "talk", "tags": {tags}}}')
    row = {"talk": [{"role": "me", "text": "q"}, {"role": "you", "text": "a"}]}
    assert texts(row, how) == ["user: q", "assistant: a"]
    how = map_keys(handler_form("OpenAIInstructionHandler"), f'{{"messages": "talk", "system": "sys", "tags": {tags}}}')
    assert texts({**row, "sys": "s"}, how) == ["system: s", "user: q", "assistant: a"]


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ('{"prompt": "instruction", "query": "input"}', {"instruction": "q", "input": ""}),
        ('{"prompt": "question", "query": ""}', {"question": "q"}),
        ('{"prompt": "question", "system": "system"}', {"question": "q", "system": ""}),
        ('{"messages": "conversations"}', {"conversations": [USER]}),
    ],
)
def test_map_keys_of_pairs(given: str, row: Any) -> None:
    how = map_keys(handler_form("AlpacaStylePairwiseHandler"), given)
    pair = parse_row({**row, "chosen": "a", "rejected": "b"}, how)
    assert isinstance(pair, Preference)
    assert [message.content for message in pair.chosen.messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("AlpacaStyle", "{prompt: q}", "is no JSON"),
        ("AlpacaStyle", '["q"]', "a JSON object of names"),
        ("AlpacaStyle", '{"promt": "q"}', "unknown name 'promt'; known are instruction"),
        ("AlpacaStyle", '{"outputs": "q"}', "did you mean 'output'"),
        ("AlpacaStyle", '{"response": ""}', "'response' is the name of a column"),
        ("AlpacaStyle", '{"prompt": 5}', "'prompt' is the name of a column, not 5"),
        ("AlpacaStyle", '{"tags": {}}', "have none"),
        ("SharegptStyle", '{"tags": "from"}', "'tags' is a JSON object"),
        ("SharegptStyle", '{"tags": {"usr_tag": "x"}}', "did you mean 'user_tag'"),
        ("SharegptStyle", '{"tags": {"user_tag": ""}}', "'user_tag' is a name"),
        ("SharegptStyle", '{"tags": {"user_tag": "x", "system_tag": "x"}}', "'x' stands for two speakers"),
        ("SharegptStyle", '{"query": "x"}', "unknown name 'query'"),
    ],
)
def test_map_keys_that_are_refused(name: str, given: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        map_keys(handler_form(f"{name}InstructionHandler"), given)
    with pytest.raises(DataError, match="fixed names"):
        map_keys(handler_form("StackOverflowPythonPretrainHandler"), "{}")


def test_a_mapped_column_that_no_row_has_is_refused() -> None:
    alpaca = handler_form("AlpacaStyleInstructionHandler")
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "context": "c"}]
    how = map_keys(alpaca, '{"prompt": "question", "query": "contxt", "response": "answer"}')
    with pytest.raises(DataError) as caught:
        check_columns(how, rows)
    assert str(caught.value) == (
        "--map-keys: no row has the column 'contxt', which is named for 'input'; "
        "the columns are question, answer, context; did you mean 'context'?"
    )
    check_columns(map_keys(alpaca, '{"prompt": "question", "query": "context"}'), rows)
    with pytest.raises(DataError, match="no row has the column 'context'"):
        check_columns(map_keys(alpaca, '{"query": "context"}'), rows[:1])


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ('{"query": "", "history": "", "prompt": "q"}', {"q": 1}),
        ('{"prompt": "instruction", "query": "input", "response": "output"}', {"instruction": "i", "output": "o"}),
        ('{"system": "sys"}', {"sys": None}),
    ],
)
def test_mapped_columns_that_are_there_or_need_not_be(given: str, row: dict[str, Any]) -> None:
    form = map_keys(handler_form("AlpacaStyleInstructionHandler"), given)
    check_columns(form, [row])
    with pytest.raises(DataError, match="no row has the column 'nowhere'"):  # the same form, asked for one column more
        check_columns(replace(form, keys={**form.keys, "input": "nowhere"}), [row])


def test_keys_of_turns_and_the_columns_of_a_handler_are_no_mapped_columns() -> None:
    tags = '{"tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me"}}'
    form = map_keys(handler_form("SharegptStyleInstructionHandler"), tags)
    check_columns(form, [{"conversations": []}])
    check_columns(handler_form("StackOverflowPythonPretrainHandler"), [{"title": "t"}])
    assert {"who", "says"} <= set(form.keys.values())
    check_columns(RowForm("alpaca", {"input": "context"}), [])
    with pytest.raises(DataError, match="context"):
        check_columns(RowForm("alpaca", {"input": "context"}), [{"instruction": "i"}])
