"""Plans: learned where a template only places texts, refused where it does more, and never wrong."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from finebridge.data_tools import plans
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.plans import Plan, Planner, fill, stretches_of
from finebridge.data_tools.schema import Rejected, Sample
from finebridge.data_tools.templates import ChatTemplate
from random_chats import Chats, both_ways

FRAME = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content }}{% else %}EXPRESSION{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLANNED = [
    "{{ m.content }}",
    "{{ m['content'] }}",
    "{{ m.content | trim }}",
    "{{ m.content.strip() }}",
    "{{- ' ' + m.content + '\n' -}}",
    "{{ m.content ~ '!' }}",
    "{% set c = m.content %}{{ c }}",
    "{% if m.content is string %}{{ m.content }}{% else %}?{% endif %}",
    "{% if m.content %}{{ m.content }}{% endif %}",
    "{{ m.content }}{% if 'NO' in m.content %} refused{% endif %}",
    "{% if m.content.startswith('hello') %}hi: {% endif %}{{ m.content }}",
    "{{ m.content.split('</think>') | last }}; {{ m.content }}",
    "{{ m.content.replace('NO', 'YES') }}; {{ m.content }}",
    "{{ m.content }}{% if m.content == 'the answer' %}?{% endif %}",
    "{{ m.content }} again {{ m.content }}",
    "{{ [m.role, m.content] | join(': ') }}",
    "{% set ns = namespace(text='') %}{% set ns.text = ns.text ~ m.content %}{{ ns.text }}",
]
REFUSED = [
    "{{ m.content | upper }}{{ m.content }}",
    "{{ m.content }}{{ m.content | length }}",
    "{{ m.content }}{{ m.content[:3] }}",
    "{{ m.content }}{{ m.content.split() | length }}",
    "{{ m.content | tojson }}{{ m.content }}",
    "{{ m.content }}{{ m.content | wordcount }}",
    "{{ m.content }}{% if m.content > 'k' %}later{% endif %}",
    "{{ m.content }}{% if m.content.isdigit() %}number{% endif %}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
    "{{ '%s' % m.content }}",
    "{{ m.content }}{{ m.content.find('a') }}",
    "{{ m.content }}{{ {m.content: 1} | length }}{{ m.content | title }}",
]


def texts_of(plan: Plan, blanks: Sequence[str], names: dict[int, str]) -> list[str]:
    """The text of each sample of a plan, its blanks filled in."""
    kinds, numbers = iter(plan.kinds.tolist()), iter(plan.numbers.tolist())
    return [
        "".join(names[kind] if kind >= 0 else fill(plan.texts[next(numbers)], blanks) for kind in islice(kinds, count))
        for count in plan.part_counts.tolist()
    ]


def found(template: ChatTemplate, rows: list[Any]) -> int:
    """How many of the rows, that have no control tokens, go by a plan; each is compared with the text as rendered in full."""
    planner = Planner(template)
    names = {number: token for token, number in template.token_ids.items()}
    count = 0
    for row in rows:
        try:
            sample = parse_row(row, RowForm("messages"))
            assert isinstance(sample, Sample)
            known = planner.find(sample)
        except Rejected:
            continue
        if known is None:
            continue
        count += 1
        texts = [text for text, _ in stretches_of(template, sample.messages, sample.template_kwargs)]
        assert texts_of(*known, names) == texts
    return count


def own(tokenizers: dict[str, Any], expression: str) -> ChatTemplate:
    tokenizers["chatml"].chat_template = FRAME.replace("EXPRESSION", expression)
    return ChatTemplate(tokenizers["chatml"], None)


@pytest.mark.parametrize("expression", PLANNED)
def test_templates_that_place_texts_have_plans(tokenizers_by_template: dict[str, Any], expression: str) -> None:
    template = own(tokenizers_by_template, expression)
    assert found(template, [row for row in Chats(41).rows(120) if "reasoning" not in str(row)]) > 40
    both_ways(template.tokenizer, DataArguments(), Chats(42, ["<|im_end|>"]).rows(80))


@pytest.mark.parametrize("expression", REFUSED)
def test_templates_that_do_more_have_none(tokenizers_by_template: dict[str, Any], expression: str) -> None:
    template = own(tokenizers_by_template, expression)
    asked = [row for row in Chats(41).rows(60) if all(turn["content"].strip() for turn in row["messages"])]
    assert found(template, asked) == 0
    both_ways(template.tokenizer, DataArguments(), Chats(42, ["<|im_end|>"]).rows(60))


@pytest.mark.parametrize("name", ["qwen3", "chatml", "hunyuan_dense", "hunyuan_a13b", "hy3"])
def test_shipped_templates_have_plans(tokenizers_by_template: dict[str, Any], name: str) -> None:
    rows = [row for row in Chats(43).rows(300) if not any("reasoning_content" in turn for turn in row["messages"])]
    assert found(ChatTemplate(tokenizers_by_template[name], name), rows) > len(rows) // 2


def test_a_shape_is_learned_once(tokenizers_by_template: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizers_by_template["chatml"], "chatml")
    planner = Planner(template)
    rendered: list[int] = []
    honest = template.render
    monkeypatch.setattr(template, "render", lambda *args, **more: (rendered.append(1), honest(*args, **more))[1])

    def ask(question: str, answer: str = "a") -> Any:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return planner.find(parse_row({"messages": turns}, RowForm("messages")))

    first = ask("q")
    while first is None:  # the first rows only tell what the template looks for
        first = ask("q")
    known = len(rendered)
    plan, blanks = ask("a rather different question", "and its answer")
    assert plan is first[0]
    assert blanks == ["a rather different question", "and its answer"]
    assert len(rendered) == known
    ask("")
    assert len(rendered) > known


def test_the_memory_of_plans_is_bounded(
    tokenizers_by_template: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_MAX_PLANS", 3)
    rows = Chats(44, tools=True).rows(150)
    made = both_ways(tokenizers_by_template["qwen3"], DataArguments(chat_template="qwen3"), rows)
    assert len(made.lengths) > 100


def test_words_that_a_template_looks_for_are_found_across_borders(tokenizers_by_template: dict[str, Any]) -> None:
    """Texts of which only together, or only with the template's own words, the looked-for word is made."""
    template = own(
        tokenizers_by_template, "{% set c = 'A' ~ m.content ~ 'B' %}{{ c }}{{ ' seen' if 'AxB' in c else '' }}"
    )
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
        for text in ("q", "x", "AxB", "xB", "Ax", "y", "x", "", "AxBAxB")
    ]
    made = both_ways(template.tokenizer, DataArguments(), rows)
    texts = [template.tokenizer.decode(sample.ids.tolist()) for sample in made.samples()]
    assert [" seen" in text for text in texts] == [False, True, True, True, True, False, True, False, True]
