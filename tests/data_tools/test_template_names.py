"""Other systems' names of chat templates: known and rendered here, or refused with the nearest."""

import re

import pytest
from finebridge.data_tools.schema import DataError
from finebridge.data_tools.template_names import ALIASES, resolve
from finebridge.data_tools.templates import shipped, template_source

AUTOALIGN = (
    "chatml-idsys chatml-keep-system chatml-with-empty-think llama-2-chat llama-2-chat-keep-system llama-3-instruct "
    "llama-4-instruct mistral-instruct gemma zephyr glm-4-chat glm-4-chat-keep-system deepseek-coder-v1.5 deepseek-v3 "
    "vicuna_v1.1 autoalign:chatml"
).split()
MINDSPEED = (
    "default empty trl glm4 chatml qwen llama3 llama2 mistral mixtral gemma alpaca deepseek2 deepseek2-lite deepseek3 "
    "hunyuan qwen3 plm qwen_lf"
).split()
ABSENT = (
    "gpt-4 baichuan2 bailing_mini chatglm2 chatglm3 chatglm3_system chatml_de cpm deepseek4 glm4_moe gpt_oss intern2 "
    "magistral qwen_math_r1 qwen_r1"
).split()


@pytest.mark.parametrize("name", [*AUTOALIGN, *MINDSPEED])
def test_names_of_other_systems_are_known(name: str) -> None:
    stem = resolve(name) or name
    assert stem in shipped()
    assert template_source(name) == template_source(stem)


@pytest.mark.parametrize("name", ABSENT)
def test_a_known_name_without_a_template_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(DataError, match=f"the template {name} is not shipped: ") as error:
        template_source(name)
    assert str(error.value).split("of those shipped ")[1].removesuffix(" is nearest") in shipped()


def test_no_alias_hides_a_template() -> None:
    assert not set(ALIASES) & set(shipped())
    assert set(ALIASES.values()) <= set(shipped())
    assert resolve("something else") is None


def test_a_mistyped_alias_names_the_right_one() -> None:
    with pytest.raises(DataError, match=re.escape("did you mean llama-3-instruct?")):
        template_source("llama-3-instuct")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("hunyuan-dense", "hunyuan_dense"),
        ("hunyuan-a13b", "hunyuan_a13b"),
        ("glm_4", "glm-4"),
        ("chatml_empty_think", "chatml-empty-think"),
        ("llama_3-instruct", "llama-3"),
        ("vicuna-v1.1", "vicuna"),
    ],
)
def test_dashes_and_underscores_are_alike(name: str, stem: str) -> None:
    assert resolve(name) == stem
    assert template_source(name) == template_source(stem)


def test_dashes_and_underscores_do_not_make_two_names_one() -> None:
    names = [*shipped(), *ALIASES, *ABSENT]
    assert len({name.replace("_", "-") for name in names}) == len(names)
    assert resolve("GLM-4") is None
    with pytest.raises(DataError, match="the template glm4-moe is not shipped"):
        resolve("glm4-moe")
