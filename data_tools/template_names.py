"""Other systems' names of chat templates: which shipped template is meant, and which names have none here.

Sources: the 17 templates of AutoAlign (``src/autoalign/conversation.py``) and the prompt types of MindSpeed-LLM
(``configs/finetune/templates.json``). A name that is itself a file of ``chat_templates`` is in neither table. What a
template does unlike the system that a name comes from is told on top of its file.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from .schema import DataError

ALIASES: Mapping[str, str] = {
    # AutoAlign. "chatml" has a default system prompt there and none in MindSpeed-LLM and here, hence the prefix.
    "autoalign:chatml": "qwen2",
    "chatml-keep-system": "chatml",
    "chatml-with-empty-think": "chatml-empty-think",
    "glm-4-chat-keep-system": "glm-4",
    "llama-2-chat-keep-system": "llama-2",
    "llama-3-instruct": "llama-3",
    "llama-4-instruct": "llama-4",
    "mistral-instruct": "mistral-tekken",
    "vicuna_v1.1": "vicuna",
    # MindSpeed-LLM
    "deepseek2": "deepseek-v2",
    "deepseek2-lite": "deepseek-v2",
    "deepseek3": "deepseek-v3",
    "default": "human-assistant",
    "glm4": "glm-4",
    "hunyuan": "hunyuan_a13b",
    "llama2": "llama-2",
    "llama3": "llama-3",
    "mixtral": "mistral",
    "plm": "qwen2",
    "qwen": "qwen2",
    "qwen_lf": "qwen2.5",
}
"""Name in another system -> name (stem) of the shipped template that renders the same family of text."""

_ABSENT: Mapping[str, tuple[str, str]] = {
    "gpt-4": ("AutoAlign uses it for requests to an API; it has no text to train on", "chatml"),
    "baichuan2": ("it writes reserved tokens of Baichuan 2", "empty"),
    "bailing_mini": ("it writes <role>HUMAN</role>", "chatml"),
    "chatglm2": ("it numbers the rounds of ChatGLM2", "glm-4"),
    "chatglm3": ("ChatGLM3 opens texts with other tokens", "glm-4"),
    "chatglm3_system": ("ChatGLM3 opens texts with other tokens", "glm-4"),
    "chatml_de": ("its German default system prompt is not shipped; put it into the data", "chatml"),
    "cpm": ("it writes <用户> and <AI> of MiniCPM", "trl"),
    "deepseek4": ("DeepSeek-V4 renders thoughts and tools in its own way", "deepseek-v3"),
    "glm4_moe": ("GLM-4.5 renders thoughts", "glm-4"),
    "gpt_oss": ("it writes the channels of gpt-oss", "chatml"),
    "intern2": ("InternLM2 opens texts with its begin token", "chatml"),
    "magistral": ("it writes [SYSTEM_PROMPT] of Mistral's v7 tokenizer", "mistral-tekken"),
    "qwen_math_r1": ("its default system prompt is not shipped; put it into the data", "qwen2"),
    "qwen_r1": ("it puts an instruction before each question; put it into the data", "qwen2"),
}


def resolve(name: str) -> str | None:
    """The stem of the shipped template that its own or another system's name means; None when the name is no such name.

    Dashes and underscores are alike, letters of another case are not. Raises DataError, with the nearest shipped template,
    for a known name whose text no shipped template renders.
    """
    known = _known_names().get(_folded(name), "")
    if known in _ABSENT:
        reason, nearest = _ABSENT[known]
        raise DataError(
            f"the template {name} is not shipped: {reason}. Use the tokenizer's own template or your own .jinja file; "
            f"of those shipped {nearest} is nearest"
        )
    return ALIASES.get(known, known) or None


@cache
def _known_names() -> Mapping[str, str]:
    """Every known name, by its folded form."""
    shipped = sorted(path.stem for path in (Path(__file__).parent / "chat_templates").glob("*.jinja"))
    return {_folded(name): name for name in (*_ABSENT, *ALIASES, *shipped)}


def _folded(name: str) -> str:
    return name.replace("_", "-")
