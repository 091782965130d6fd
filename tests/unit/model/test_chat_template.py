import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.model import chat_template
from pyggml_repkv.model.chat_template import KEY, ChatTemplate
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import MIN_VOCAB, tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def rendered(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate({"default": source}).render(messages or HELLO, **variables)


def metadata(**templates: Any) -> dict[str, Any]:
    """Tokenizer metadata with the given templates; `default` is the unnamed one."""
    keys = {f"{KEY}.{name}".removesuffix(".default"): value for name, value in templates.items()}
    plain = {key: value for key, (value, _) in tiny_tokenizer(MIN_VOCAB).items() if key != KEY}
    return plain | keys


def from_metadata(**templates: Any) -> ChatTemplate | None:
    keys = metadata(**templates)
    return ChatTemplate.from_metadata(keys, Tokenizer.from_metadata(keys))


def test_the_template_of_the_file_renders_a_conversation() -> None:
    keys = {key: value for key, (value, _) in tiny_tokenizer(MIN_VOCAB).items()}
    tokenizer = Tokenizer.from_metadata(keys)
    template = ChatTemplate.from_metadata(keys, tokenizer)
    assert template is not None
    prompt = template.render([{"role": "system", "content": "Be brief."}, *HELLO])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")
    ids = tokenizer.encode(prompt, parse_special=True)
    assert sum(tokenizer.is_special(i) for i in ids) == 5
    assert tokenizer.decode(ids) == prompt


def test_a_file_without_template_has_none() -> None:
    assert from_metadata() is None


def test_a_template_that_is_no_text_is_an_error() -> None:
    with pytest.raises(ModelFileError, match="'tool_use' is no string"):
        from_metadata(default="x", tool_use=3)


def test_named_templates_default_first_and_tool_use_for_tools() -> None:
    both = from_metadata(rag="r", tool_use="t", default="d")
    only_named = from_metadata(rag="r")
    assert both is not None
    assert only_named is not None
    assert both.render(HELLO) == both.render(HELLO, tools=[]) == "d"
    assert both.render(HELLO, tools=[{"name": "f"}]) == "t"
    assert only_named.render(HELLO) == only_named.render(HELLO, tools=[{"name": "f"}]) == "r"


def test_start_and_end_tokens_are_variables() -> None:
    source = "{{ bos_token }}|{{ eos_token }}"
    named = from_metadata(default=source)
    assert named is not None
    assert named.render(HELLO) == "<|endoftext|>|<|im_end|>"
    assert named.render(HELLO, bos_token="<s>") == "<s>|<|im_end|>"
    assert rendered(source) == "|"


def test_tools_documents_and_further_variables_are_passed_through() -> None:
    source = "{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }}"
    assert rendered(source) == "True True False"
    assert rendered(source, tools=[1], documents=[2], enable_thinking=False) == "False False True"


def test_blocks_are_trimmed_as_transformers_does() -> None:
    source = "{% for m in messages %}\n    {% if m %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}\n"
    assert rendered(source) == "  user\n"


def test_loop_controls() -> None:
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}{% break %}"
    assert rendered(source + "{% endif %}{% endfor %}") == "023"


def test_loops_keep_their_variables_and_else() -> None:
    source = "{% for i in 'ab' %}{{ loop.index }}{{ loop.last }} {% endfor %}"
    assert rendered(source + "{% for i in [] %}{% else %}none{% endfor %}") == "1False 2True none"


def test_generation_blocks_show_their_content() -> None:
    source = "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}"
    assert rendered(source) == "hello"


def test_tojson_is_plain_json() -> None:
    value = {"b": "<é> & 'x'", "a": [1, None]}
    assert rendered("{{ v | tojson }}", v=value) == json.dumps(value, ensure_ascii=False)
    source = "{{ v | tojson(indent=2, sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}"
    assert rendered(source, v=value) == json.dumps(value, indent=2, sort_keys=True, separators=(",", ":"))


def test_strftime_now() -> None:
    assert rendered("{{ strftime_now('%Y') }}") in {str(datetime.now().year + step) for step in (-1, 0)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
        ("ok\n{% if %}", "line 2: Expected an expression"),
        ("{% nonsense %}", "line 1: Encountered unknown tag 'nonsense'"),
        ("{{ missing.name }}", "'missing' is undefined"),
        ("{{ messages[0].nothing + 'x' }}", "no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ raise_exception('x' * 9999) }}", "xxx"),
    ],
)
def test_template_errors_are_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        rendered(source)
    assert message in str(caught.value)
    assert str(caught.value).startswith("chat template 'default'")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
    ],
)
def test_the_sandbox_keeps_templates_in(source: str) -> None:
    with pytest.raises(InputError, match=r"unsafe|undefined"):
        rendered(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(10 ** 9) %}{% endfor %}", "MAX_RANGE"),
        ("{% for a in range(99) %}{% for b in range(99) %}{% endfor %}{% endfor %}", "loops go round more"),
        (
            "{% macro m() %}{% for a in range(99) %}{% endfor %}{% endmacro %}" + 11 * "{{ m() }}",
            "loops go round",
        ),
        ("{% for a in range(50) %}{{ 'xy' * 40 }}{% endfor %}", "writes more than 2000"),
        ("{{ 'x' * 10 ** 12 }}", r"\* makes more than"),
        ("{{ 10 ** 12 * [1] }}", r"\* makes more than"),
        ("{{ 2 ** (10 ** 9) }}", r"\*\* makes more than"),
        ("x" * 3001, "it has 3001 characters"),
    ],
)
def test_endless_and_huge_templates_end(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_ITERATIONS", 1000)
    monkeypatch.setattr(chat_template, "MAX_OUTPUT", 2000)
    monkeypatch.setattr(chat_template, "MAX_SOURCE", 3000)
    with pytest.raises(InputError, match=message):
        rendered(source)


def test_loops_are_counted_for_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_ITERATIONS", 10)
    template = ChatTemplate({"default": "{% for a in range(10) %}{{ a }}{% endfor %}"})
    assert [template.render(HELLO) for _ in range(3)] == ["0123456789"] * 3


def test_arithmetic_works_in_the_sandbox() -> None:
    assert rendered("{{ 3 * 4 }} {{ 2 ** 10 }} {{ 2 ** 0.5 > 1 }} {{ -1 * 'x' }}{{ 2 * 'ab' }}") == (
        "12 1024 True abab"
    )


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_counted: Callable[..., Any] = chat_template._Environment.compile_counted
    monkeypatch.setattr(
        chat_template._Environment,
        "compile_counted",
        lambda self, source: compiled.append(source) or compile_counted(self, source),
    )
    template = ChatTemplate({"default": "{{ messages[0].content }}"})
    assert template.render(HELLO) == template.render(HELLO) == "hello"
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        (None, "at least one"),
        (["hello"], r"messages\[0\] is 'hello'"),
        ([*HELLO, {"content": "x"}], r"messages\[1\] has no role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "tool_calls": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        ([{"role": "user", "content": {"text": "x"}}], r"messages\[0\].content is {"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content\[0\] is {'type': 'image_url'}",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], r"messages\[0\].content\[1\] is 'b'"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate({"default": "x"}).render(messages)


def test_parts_of_a_message_are_joined_and_null_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"
    assert rendered("<{{ messages[0].content }}>", [{"role": "user", "content": None}]) == "<>"
    assert rendered("<{{ messages[0].content }}>", [{"role": "user", "content": []}]) == "<>"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    assert rendered("{{ messages[0].content is none }}{{ messages[0].tool_calls[0].function.arguments }}", [call]) == (
        "True{"
    )


def test_tool_calls_may_stand_for_content() -> None:
    assert rendered("{{ messages[0].tool_calls[0] }}", [{"role": "assistant", "tool_calls": ["f()"]}]) == "f()"
