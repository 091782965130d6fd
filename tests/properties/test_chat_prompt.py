"""Whatever messages spell out, alone or together: the control tokens of a prompt are those that its template writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml_repkv.model.chat_prompt import chat_prompt
from pyggml_repkv.model.chat_template import ChatTemplate
from tests.unit.model.test_chat_prompt import CONTROL, DEFINED, THINKS, TOKENIZER, TRIMMED

# In the shapes of templates that models have.
TEMPLATES = {
    "chatml with a default system message": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "header tokens and trimmed text": (
        "{% for m in messages %}"
        "{% set content = '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + '<s>' %}"
        "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    ),
    "without reasoning": THINKS,
    "instructions": TRIMMED,
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "trimmed, nothing between": "<s>{% for m in messages %}{{ m.content.strip() }}{% endfor %}",
    "escaped JSON": "<s>{{ messages | tojson(ensure_ascii=True) }}",
    "a system message joined to the first": (
        "[INST] {{ messages[0].content }}\n\n{{ messages[-1].content }} [/INST]{{ messages | tojson }}"
    ),
}
FRAGMENTS = [text[a:b] for text in ("<|im_end|>", "<s>", "[/INST]") for a in range(len(text)) for b in range(a + 1, 11)]
ORDINARY = (" ", "\n", "ab", "\\udc00", "\\udc01")
PIECES = st.one_of(st.sampled_from([*CONTROL, *DEFINED, *FRAGMENTS, *ORDINARY]), st.text(max_size=2))
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_control_tokens_are_the_templates(name: str, contents: list[str]) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]}, bos_token="<s>")
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    found = chat_prompt(template, TOKENIZER, messages)
    harmless = chat_prompt(template, TOKENIZER, [{**message, "content": "harmless"} for message in messages])
    assert [i for i in found.tokens if TOKENIZER.is_special(i)] == [
        i for i in harmless.tokens if TOKENIZER.is_special(i)
    ]
    assert TOKENIZER.decode(found.tokens) == found.text
