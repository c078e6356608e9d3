"""What the shipped chat templates render: golden texts written by hand.

In a golden text ``‖`` marks where the prompt of the last turn ends, ``⏎`` is a line break.
"""

import re
from typing import Any

import pytest
from chats import CALLS, EMPTY, ONE, TOOL, TWO, Turns, answer, call, render, user
from finebridge.data_tools.templates import shipped, template_source
from jinja2 import TemplateError

VARIABLES = {"hy3": {"bos_token": "<｜hy_begin_of_sentence:x｜>"}}
ZHUQUE = (
    "<|im_start|>system⏎You are Zhuque, a conversational AI assistant trained by Chinese Information Processing "
    "Laboratory (CIP). 你是朱雀，一个由中文信息处理实验室训练的对话式人工智能助手。 You are to give helpful, "
    "detailed, and polite answers to the user's questions. 你应当为用户的问题提供有帮助的、详细的、礼貌的回答。<|im_end|>⏎"
)
CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you only "
    "answer questions related to computer science. For politically sensitive questions, security and privacy issues, and "
    "other non-computer science questions, you will refuse to answer⏎"
)
LLAMA_2 = (
    "<<SYS>>⏎You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.⏎⏎If a question does not make any "
    "sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information.⏎<</SYS>>⏎⏎"
)
GLM = (
    "<|system|>⏎你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。保持用户原始描述的意图。不要虚构内容或者没见过的人物。⏎"
    "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. "
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.⏎⏎"
DATES = "Cutting Knowledge Date: December 2023⏎Today Date: 26 Jul 2024⏎⏎"
IM_ONE = "<|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎‖a<|im_end|>⏎"
IM_TWO = (
    "<|im_start|>system⏎S<|im_end|>⏎<|im_start|>user⏎q1<|im_end|>⏎<|im_start|>assistant⏎a1<|im_end|>⏎"
    "<|im_start|>user⏎q2<|im_end|>⏎<|im_start|>assistant⏎‖a2<|im_end|>⏎"
)
IM_EMPTY = "<|im_start|>system⏎<|im_end|>⏎"
H3 = "<|start_header_id|>{}<|end_header_id|>⏎⏎"
H3U, H3A, H3S = H3.format("user"), H3.format("assistant"), H3.format("system")
H4U, H4A, H4S = (f"<|header_start|>{role}<|header_end|>⏎⏎" for role in ("user", "assistant", "system"))

# template -> no system prompt; a system prompt and two rounds; a system prompt that is there but empty
GOLDEN: dict[str, tuple[str, str, str]] = {
    "alpaca": (
        ALPACA + "### Instruction:⏎q⏎⏎### Response:⏎‖a</s>",
        "S⏎⏎### Instruction:⏎q1⏎⏎### Response:⏎a1</s>⏎⏎### Instruction:⏎q2⏎⏎### Response:⏎‖a2</s>",
        "### Instruction:⏎q⏎⏎### Response:⏎‖a</s>",
    ),
    "chatml": (IM_ONE, IM_TWO, IM_EMPTY + IM_ONE),
    "chatml-empty-think": (
        "<|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎‖a<|im_end|>⏎",
        "<|im_start|>system⏎S<|im_end|>⏎<|im_start|>user⏎q1<|im_end|>⏎"
        "<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎a1<|im_end|>⏎<|im_start|>user⏎q2<|im_end|>⏎"
        "<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎‖a2<|im_end|>⏎",
        IM_EMPTY + "<|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎‖a<|im_end|>⏎",
    ),
    "chatml-idsys": (ZHUQUE + IM_ONE, IM_TWO, IM_EMPTY + IM_ONE),
    "deepseek-coder-v1.5": (
        "<s>" + CODER + "### Instruction:⏎q⏎### Response:⏎‖a⏎<|EOT|>⏎",
        "<s>S### Instruction:⏎q1⏎### Response:⏎a1⏎<|EOT|>⏎### Instruction:⏎q2⏎### Response:⏎‖a2⏎<|EOT|>⏎",
        "<s>### Instruction:⏎q⏎### Response:⏎‖a⏎<|EOT|>⏎",
    ),
    "deepseek-v2": (
        "<s>User: q⏎⏎Assistant:‖ a</s>",
        "<s>S⏎⏎User: q1⏎⏎Assistant: a1</s>User: q2⏎⏎Assistant:‖ a2</s>",
        "<s>⏎⏎User: q⏎⏎Assistant:‖ a</s>",
    ),
    "deepseek-v3": (
        "<s><｜User｜>q<｜Assistant｜>‖a<｜end▁of▁sentence｜>",
        "<s>S<｜User｜>q1<｜Assistant｜>a1<｜end▁of▁sentence｜><｜User｜>q2<｜Assistant｜>‖a2<｜end▁of▁sentence｜>",
        "<s><｜User｜>q<｜Assistant｜>‖a<｜end▁of▁sentence｜>",
    ),
    "empty": ("q‖a</s>", "Sq1a1</s>q2‖a2</s>", "q‖a</s>"),
    "gemma": (
        "<s><start_of_turn>user⏎q<end_of_turn>⏎<start_of_turn>model⏎‖a<end_of_turn>⏎",
        "<s><start_of_turn>user⏎S⏎⏎q1<end_of_turn>⏎<start_of_turn>model⏎a1<end_of_turn>⏎"
        "<start_of_turn>user⏎q2<end_of_turn>⏎<start_of_turn>model⏎‖a2<end_of_turn>⏎",
        "<s><start_of_turn>user⏎⏎⏎q<end_of_turn>⏎<start_of_turn>model⏎‖a<end_of_turn>⏎",
    ),
    "glm-4": (
        "[gMASK]<sop><|user|>⏎q<|assistant|>‖⏎a<|user|>",
        "[gMASK]<sop><|system|>⏎S<|user|>⏎q1<|assistant|>⏎a1<|user|>⏎q2<|assistant|>‖⏎a2<|user|>",
        "[gMASK]<sop><|system|>⏎<|user|>⏎q<|assistant|>‖⏎a<|user|>",
    ),
    "glm-4-chat": (
        "[gMASK]<sop>" + GLM + "<|user|>⏎q<|assistant|>‖⏎a<|user|>",
        "[gMASK]<sop><|system|>⏎S<|user|>⏎q1<|assistant|>⏎a1<|user|>⏎q2<|assistant|>‖⏎a2<|user|>",
        "[gMASK]<sop><|system|>⏎<|user|>⏎q<|assistant|>‖⏎a<|user|>",
    ),
    "human-assistant": (
        "Human: q⏎Assistant:‖a</s>",
        "S⏎Human: q1⏎Assistant:a1</s>⏎Human: q2⏎Assistant:‖a2</s>",
        "⏎Human: q⏎Assistant:‖a</s>",
    ),
    "hunyuan_a13b": (
        "<|startoftext|>q<|extra_0|>‖a<|eos|>",
        "<|startoftext|>S<|extra_4|>q1<|extra_0|>a1<|eos|><|startoftext|>q2<|extra_0|>‖a2<|eos|>",
        "<|startoftext|>q<|extra_0|>‖a<|eos|>",
    ),
    "hunyuan_dense": (
        "<｜hy_begin▁of▁sentence｜><｜hy_User｜>q<｜hy_Assistant｜>‖a<｜hy_place▁holder▁no▁2｜>",
        "<｜hy_begin▁of▁sentence｜>S<｜hy_place▁holder▁no▁3｜><｜hy_User｜>q1<｜hy_Assistant｜>a1<｜hy_place▁holder▁no▁2｜>"
        "<｜hy_User｜>q2<｜hy_Assistant｜>‖a2<｜hy_place▁holder▁no▁2｜>",
        "<｜hy_begin▁of▁sentence｜><｜hy_place▁holder▁no▁3｜><｜hy_User｜>q<｜hy_Assistant｜>‖a<｜hy_place▁holder▁no▁2｜>",
    ),
    "hy3": (
        "<｜hy_begin_of_sentence:x｜><｜reasoning_mode:x｜>reasoning_effort:no_think<｜hy_User:x｜>q"
        "<｜hy_Assistant:x｜><think:x></think:x>‖a<｜hy_eos:x｜>",
        "<｜hy_begin_of_sentence:x｜>S<｜reasoning_mode:x｜>reasoning_effort:no_think<｜hy_User:x｜>q1"
        "<｜hy_Assistant:x｜><think:x></think:x>a1<｜hy_eos:x｜><｜hy_User:x｜>q2"
        "<｜hy_Assistant:x｜><think:x></think:x>‖a2<｜hy_eos:x｜>",
        "<｜hy_begin_of_sentence:x｜><｜reasoning_mode:x｜>reasoning_effort:no_think<｜hy_User:x｜>q"
        "<｜hy_Assistant:x｜><think:x></think:x>‖a<｜hy_eos:x｜>",
    ),
    "llama-2": (
        "<s>[INST] q [/INST]‖ a </s>",
        "<s>[INST] <<SYS>>⏎S⏎<</SYS>>⏎⏎q1 [/INST] a1 </s><s>[INST] q2 [/INST]‖ a2 </s>",
        "<s>[INST] q [/INST]‖ a </s>",
    ),
    "llama-2-chat": (
        "<s>[INST] " + LLAMA_2 + "q [/INST]‖ a </s>",
        "<s>[INST] <<SYS>>⏎S⏎<</SYS>>⏎⏎q1 [/INST] a1 </s><s>[INST] q2 [/INST]‖ a2 </s>",
        "<s>[INST] q [/INST]‖ a </s>",
    ),
    "llama-3": (
        f"<s>{H3U}q<|eot_id|>{H3A}‖a<|eot_id|>",
        f"<s>{H3S}S<|eot_id|>{H3U}q1<|eot_id|>{H3A}a1<|eot_id|>{H3U}q2<|eot_id|>{H3A}‖a2<|eot_id|>",
        f"<s>{H3S}<|eot_id|>{H3U}q<|eot_id|>{H3A}‖a<|eot_id|>",
    ),
    "llama-3.1": (
        f"<s>{H3S}{DATES}<|eot_id|>{H3U}q<|eot_id|>{H3A}‖a<|eot_id|>",
        f"<s>{H3S}{DATES}S<|eot_id|>{H3U}q1<|eot_id|>{H3A}a1<|eot_id|>{H3U}q2<|eot_id|>{H3A}‖a2<|eot_id|>",
        f"<s>{H3S}{DATES}<|eot_id|>{H3U}q<|eot_id|>{H3A}‖a<|eot_id|>",
    ),
    "llama-4": (
        f"<s>{H4U}q<|eot|>{H4A}‖a<|eot|>",
        f"<s>{H4S}S<|eot|>{H4U}q1<|eot|>{H4A}a1<|eot|>{H4U}q2<|eot|>{H4A}‖a2<|eot|>",
        f"<s>{H4S}<|eot|>{H4U}q<|eot|>{H4A}‖a<|eot|>",
    ),
    "mistral": (
        "<s>[INST] q [/INST]‖ a</s>",
        "<s>[INST] S⏎⏎q1 [/INST] a1</s>[INST] q2 [/INST]‖ a2</s>",
        "<s>[INST] ⏎⏎q [/INST]‖ a</s>",
    ),
    "mistral-tekken": (
        "<s>[INST]q[/INST]‖a</s>",
        "<s>[INST]q1[/INST]a1</s>[INST]S⏎⏎q2[/INST]‖a2</s>",
        "<s>[INST]⏎⏎q[/INST]‖a</s>",
    ),
    "qwen2": ("<|im_start|>system⏎You are a helpful assistant.<|im_end|>⏎" + IM_ONE, IM_TWO, IM_EMPTY + IM_ONE),
    "qwen2.5": (
        "<|im_start|>system⏎You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>⏎" + IM_ONE,
        IM_TWO,
        IM_EMPTY + IM_ONE,
    ),
    "qwen3": (
        IM_ONE.replace("‖", "‖<think>⏎⏎</think>⏎⏎"),
        IM_TWO.replace("‖", "‖<think>⏎⏎</think>⏎⏎"),
        IM_EMPTY + IM_ONE.replace("‖", "‖<think>⏎⏎</think>⏎⏎"),
    ),
    "trl": ("<s>q‖a</s>", "<s>Sq1a1</s>q2‖a2</s>", "<s>q‖a</s>"),
    "vicuna": (
        "<s>" + VICUNA + "USER: q ASSISTANT:‖ a</s>",
        "<s>S USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:‖ a2</s>",
        "<s>USER: q ASSISTANT:‖ a</s>",
    ),
    "zephyr": (
        "<|user|>⏎q</s>⏎<|assistant|>⏎‖a</s>⏎",
        "<|system|>⏎S</s>⏎<|user|>⏎q1</s>⏎<|assistant|>⏎a1</s>⏎<|user|>⏎q2</s>⏎<|assistant|>⏎‖a2</s>⏎",
        "<|system|>⏎</s>⏎<|user|>⏎q</s>⏎<|assistant|>⏎‖a</s>⏎",
    ),
}


def test_every_shipped_template_has_golden_texts() -> None:
    assert sorted(GOLDEN) == shipped()


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(("index", "turns"), list(enumerate([ONE, TWO, EMPTY])))
def test_golden_text_and_prompt(name: str, index: int, turns: Turns) -> None:
    golden = GOLDEN[name][index].replace("⏎", "\n")
    source, variables = template_source(name), VARIABLES.get(name, {})
    assert render(source, turns, **variables) == golden.replace("‖", "")
    assert render(source, turns[:-1], prompt=True, **variables) == golden.partition("‖")[0]


@pytest.mark.parametrize("name", GOLDEN)
def test_comment_says_what_it_is_for(name: str) -> None:
    assert re.match(r"\{#- .{40,}", template_source(name))


# ---------------------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("name", "turns", "options", "golden"),
    [
        ("qwen3", [user("q1"), answer("a1", reasoning_content="t1"), user("q2"), answer("a2", reasoning_content="t2")], {},
         "<|im_start|>user⏎q1<|im_end|>⏎<|im_start|>assistant⏎a1<|im_end|>⏎<|im_start|>user⏎q2<|im_end|>⏎"
         "<|im_start|>assistant⏎<think>⏎t2⏎</think>⏎⏎a2<|im_end|>⏎"),
        ("qwen3", [user("q"), answer("<think>t</think><answer>a</answer>")], {},
         "<|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎<think>⏎t⏎</think>⏎⏎<answer>a</answer><|im_end|>⏎"),
        ("qwen3", [user("q")], {"prompt": True, "enable_thinking": False},
         "<|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎"),
        ("hunyuan_dense", [user("q")], {"prompt": True, "enable_thinking": False},
         "<｜hy_begin▁of▁sentence｜><｜hy_User｜>q<｜hy_Assistant｜><think>⏎⏎</think>⏎"),
        ("hunyuan_a13b", [user("q")], {"prompt": True, "enable_thinking": False},
         "<|startoftext|>q<|extra_0|><think>⏎⏎</think>⏎"),
        # the text is the same with and without the switch: the original puts an empty thought after the last end token
        ("hunyuan_a13b", ONE, {"enable_thinking": False}, "<|startoftext|>q<|extra_0|>a<|eos|>"),
        ("hy3", [user("q1"), answer("a1", reasoning_content="t1"), user("q2"), answer("a2", reasoning_content="t2")],
         {"reasoning_effort": "high"},
         "<｜hy_begin_of_sentence:x｜><｜reasoning_mode:x｜>reasoning_effort:high<｜hy_User:x｜>q1<｜hy_Assistant:x｜><think:x>"
         "</think:x>a1<｜hy_eos:x｜><｜hy_User:x｜>q2<｜hy_Assistant:x｜><think:x>t2</think:x>a2<｜hy_eos:x｜>"),
        ("hy3", [user("q")], {"prompt": True, "reasoning_effort": "low"},
         "<｜hy_begin_of_sentence:x｜><｜reasoning_mode:x｜>reasoning_effort:low<｜hy_User:x｜>q<｜hy_Assistant:x｜><think:x>"),
        ("llama-3.1", [user("q")], {"date_string": "1 Jan 2026"},
         f"<s>{H3S}Cutting Knowledge Date: December 2023⏎Today Date: 1 Jan 2026⏎⏎<|eot_id|>{H3U}q<|eot_id|>"),
    ],
)  # fmt: skip
def test_thoughts_and_switches(name: str, turns: Turns, options: dict[str, Any], golden: str) -> None:
    text = render(template_source(name), turns, **VARIABLES.get(name, {}), **options)
    assert text == golden.replace("⏎", "\n")


# ------------------------------------------------------------------------------------------------------------- tools

TOOL_TEXT = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
QWEN_TOOLS = (
    "# Tools⏎⏎You may call one or more functions to assist with the user query.⏎⏎You are provided with function "
    f"signatures within <tools></tools> XML tags:⏎<tools>⏎{TOOL_TEXT}⏎</tools>⏎⏎For each function call, return a json "
    "object with function name and arguments within <tool_call></tool_call> XML tags:⏎<tool_call>⏎"
    '{"name": <function-name>, "arguments": <args-json-object>}⏎</tool_call><|im_end|>⏎<|im_start|>user⏎q<|im_end|>⏎'
)
QWEN_TURNS = (
    '<tool_call>⏎{"name": "add", "arguments": {"a": 1}}⏎</tool_call><|im_end|>⏎'
    "<|im_start|>user⏎<tool_response>⏎2⏎</tool_response><|im_end|>⏎<|im_start|>assistant⏎"
)
TOOLS_GOLDEN = {
    "qwen3": f"<|im_start|>system⏎S⏎⏎{QWEN_TOOLS}<|im_start|>assistant⏎{QWEN_TURNS}"
    "‖<think>⏎⏎</think>⏎⏎It is 2.<|im_end|>⏎",
    "qwen2.5": f"<|im_start|>system⏎S⏎⏎{QWEN_TOOLS}<|im_start|>assistant⏎{QWEN_TURNS}‖It is 2.<|im_end|>⏎",
    "llama-3.1": (
        f"<s>{H3S}Environment: ipython⏎{DATES}S<|eot_id|>{H3U}Given the following functions, please respond with a JSON "
        "for a function call with its proper arguments that best answers the given prompt.⏎⏎Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.⏎⏎'
        '{⏎    "type": "function",⏎    "function": {⏎        "name": "add",⏎        "parameters": {⏎'
        '            "type": "object"⏎        }⏎    }⏎}⏎⏎'
        f'q<|eot_id|>{H3A}{{"name": "add", "parameters": {{"a": 1}}}}<|eot_id|>{H3.format("ipython")}"2"<|eot_id|>'
        f"{H3A}‖It is 2.<|eot_id|>"
    ),
    "deepseek-v3": (
        "<s>S<｜User｜>q<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add⏎```json⏎"
        '{"a": 1}⏎```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>'
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>‖It is 2.<｜end▁of▁sentence｜>"
    ),
}


@pytest.mark.parametrize("name", TOOLS_GOLDEN)
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tools(name: str, arguments: Any) -> None:
    """Arguments may be an object or its JSON text; the text is the same."""
    turns = [dict(turn) for turn in CALLS]
    turns[2]["tool_calls"] = [call("add", arguments)]
    tools = {} if name == "deepseek-v3" else {"tools": [TOOL]}
    golden = TOOLS_GOLDEN[name].replace("⏎", "\n")
    assert render(template_source(name), turns, **tools) == golden.replace("‖", "")
    assert render(template_source(name), turns[:-1], prompt=True, **tools) == golden.partition("‖")[0]


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - set(TOOLS_GOLDEN)))
def test_a_template_without_tools_refuses_them(name: str) -> None:
    source, variables = template_source(name), VARIABLES.get(name, {})
    with pytest.raises(TemplateError, match="no tools"):
        render(source, ONE, tools=[TOOL], **variables)
    with pytest.raises(TemplateError, match="no tools"):
        render(source, CALLS[:3], **variables)


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"chatml", "empty", "trl"}))  # these three write any role
def test_an_unknown_role_is_refused(name: str) -> None:
    turns = [*ONE, {"role": "gpt", "content": "x"}]
    with pytest.raises(TemplateError, match="role gpt|by turns"):
        render(template_source(name), turns, **VARIABLES.get(name, {}))


@pytest.mark.parametrize("name", ["gemma", "llama-2", "llama-2-chat", "mistral", "mistral-tekken"])
def test_turns_that_the_model_never_saw_are_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="by turns"):
        render(template_source(name), [user("q1"), *ONE])


@pytest.mark.parametrize("turns", [[*CALLS[:2], answer("text", tool_calls=[call("add", {})])],
                                   [*CALLS[:2], answer("", tool_calls=[call("add", {})] * 2)]])  # fmt: skip
def test_llama_calls_one_tool_a_turn_and_says_nothing_beside(turns: Turns) -> None:
    with pytest.raises(TemplateError, match="either text or one tool call"):
        render(template_source("llama-3.1"), turns, tools=[TOOL])
