"""Messages to one prompt, by the Jinja2 template of a GGUF file.

What a template may use is what transformers gives it (utils/chat_template_utils.py). The template comes with
the model, from anywhere: it runs in a sandbox that reaches nothing outside, with bounds on loops, `*`, `**` and output.
A hostile template can still waste time and memory (recursive macros, huge paddings), as it can in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.model.tokenizer import Tokenizer

MAX_SOURCE = 1 << 20  # characters
MAX_OUTPUT = 1 << 26  # characters
MAX_ITERATIONS = 250_000  # of all loops in one rendering; about a second

KEY = "tokenizer.chat_template"


class ChatTemplate:
    """The templates of one model, `default` and named ones, compiled when first used."""

    def __init__(self, sources: Mapping[str, str], *, bos_token: str = "", eos_token: str = "") -> None:
        """`sources` by name, at least one; the tokens are the template's variables of these names."""
        self._sources = dict(sources)
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: dict[str, CodeType] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template in `metadata`; None if there is none. Raises ModelFileError if it is no text."""
        sources = {
            key.removeprefix(KEY).removeprefix(".") or "default": value
            for key, value in metadata.items()
            if key == KEY or key.startswith(f"{KEY}.")
        }
        for name, source in sources.items():
            if not isinstance(source, str):
                raise ModelFileError(f"{KEY}: the template {name!r:.80} is no string; it must be Jinja2 text")
        if not sources:
            return None
        bos, eos = (
            "" if token is None else tokenizer.decode([token]) for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(sources, bos_token=bos, eos_token=eos)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt, which spells out its special tokens and those in messages: `chat_prompt` tells them apart.

        Raises InputError for messages that are not dicts with a role and content, and for whatever the
        template refuses or cannot do.
        """
        messages = plain_messages(messages)
        name = self._choose(tools)
        given = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
        }
        # One for each rendering, because it counts the loops.
        environment = _Environment()
        try:
            code = self._compiled.get(name) or environment.compile_counted(self._sources[name])
            self._compiled[name] = code
            template = Template.from_code(environment, code, environment.make_globals(None))
            return "".join(_bounded(template.generate(self._variables | given | variables)))
        except TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
        except TemplateError as error:
            reason = str(error)
        except Exception as error:  # an expression can raise anything
            reason = f"{type(error).__name__}: {error}"
        raise InputError(f"chat template {name!r:.80}: {' '.join(reason.split()):.400}")

    def _choose(self, tools: object) -> str:
        if tools and "tool_use" in self._sources:
            return "tool_use"
        return "default" if "default" in self._sources else next(iter(self._sources))


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant wrote and changes nothing in the prompt."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """What a template can see and do, in one rendering."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._n_iterations = 0

    def compile_counted(self, source: str) -> CodeType:
        """The code of a template in which every turn of a loop calls `count_iteration`."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        template = self.parse(source)
        for loop in list(template.find_all(nodes.For)):
            call = nodes.Call(nodes.EnvironmentAttribute("count_iteration"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
        template.set_environment(self)
        return self.compile(template)

    def count_iteration(self) -> None:
        self._n_iterations += 1
        if self._n_iterations > MAX_ITERATIONS:
            raise TemplateError(f"its loops go round more than {MAX_ITERATIONS} times")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            size = left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
        else:
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            size = len(repeated) * count if isinstance(repeated, str | list | tuple) else 0
        if size > MAX_OUTPUT:
            raise TemplateError(f"{operator} makes more than {MAX_OUTPUT} characters or bits")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(blocks: Iterable[str]) -> Iterator[str]:
    n_chars = 0
    for block in blocks:
        n_chars += len(block)
        if n_chars > MAX_OUTPUT:
            raise TemplateError(f"it writes more than {MAX_OUTPUT} characters")
        yield block


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as templates expect them: content parts joined by newlines (as llama.cpp does), arguments of tool calls
    as objects. Raises InputError unless they are dicts with a role and content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages: expected a list with at least one dict, each with a role and content")
    return [_plain_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _plain_message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{name} is {message!r:.80}; it must be a dict with a role and content")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{name} has no role; 'system', 'user' and 'assistant' are usual ones")
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise InputError(f"{name} has no content; give it a text")
    plain = dict(message)
    content = message.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = "\n".join(_part_text(part, f"{name}.content[{n}]") for n, part in enumerate(content))
    elif content is None and "content" in message and not calls:
        plain["content"] = ""
    elif content is not None and not isinstance(content, str):
        raise InputError(f"{name}.content is {content!r:.80}; it must be a text or a list of parts")
    if isinstance(calls, list | tuple):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _part_text(part: object, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise InputError(f"{name} is {part!r:.80}; it must be a dict of type 'text' with a text")
    return text


def _plain_call(call: Any) -> Any:
    """With its arguments as an object, where they are JSON in a string: templates write them as JSON themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
