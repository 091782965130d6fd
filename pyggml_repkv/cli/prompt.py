"""The prompt: the text of -f and -p, put into the chat template, as token ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyggml_repkv.errors import InputError

if TYPE_CHECKING:
    from pyggml_repkv.model.chat_template import ChatTemplate
    from pyggml_repkv.model.tokenizer import Tokenizer


def read_prompt(args: argparse.Namespace) -> str:
    """Returns the text of -f followed by that of -p, unchanged. Raises InputError if one cannot be read."""
    if args.prompt is None and args.file is None:
        raise InputError("no prompt: give -p TEXT, -f FILE, or -p - to read stdin")
    parts = []
    if args.file is not None:
        parts.append(read_text_file(args.file, "-f"))
    if args.prompt == "-":
        parts.append(_decoded(_read_stdin(), "-p -"))
    elif args.prompt is not None:
        parts.append(args.prompt)
    return "".join(parts)


def read_text_file(name: str, flag: str) -> str:
    """Returns the text of the UTF-8 file `name`, given with `flag`. Raises InputError if it cannot be read."""
    try:
        path = Path(name)
        if path.is_char_device() or path.is_block_device():
            raise InputError(f"{flag} {name} is a device, which may never end; give a text file")
        return _decoded(path.read_bytes(), f"{flag} {name}")
    except OSError as error:
        raise InputError(f"{flag} {name}: {error.strerror}; give a text file") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{flag} {name!r}: {error}") from error


def check_chat_flags(args: argparse.Namespace, prompt: str) -> None:
    """Raises InputError if a flag needs --chat, or --chat excludes a flag."""
    if args.system is not None and not args.chat:
        raise InputError("--system needs --chat: only a chat template has a system message")
    if args.chat and args.no_parse_special:
        raise InputError("--no-parse-special cannot go with --chat: the template is written in special tokens")
    if args.chat and not prompt:
        raise InputError("--chat needs a message: -p TEXT or -f FILE is empty")


def apply_template(args: argparse.Namespace, prompt: str, template: ChatTemplate | None) -> str:
    """Returns the prompt as the user's message in the model's template. Raises InputError if the model has none."""
    if template is None:
        raise InputError("--chat: this model has no chat template; leave --chat out, or use an instruct model")
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return template.render(messages)


def tokenize(args: argparse.Namespace, text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of the prompt. Raises InputError if there are none."""
    tokens = tokenizer.encode(text, add_special=True, parse_special=not args.no_parse_special)
    if args.chat and tokenizer.add_bos and tokens[:2] == [tokenizer.bos_id] * 2:
        tokens = tokens[1:]  # The template writes a start token too.
    if not tokens:
        raise InputError("the prompt is empty, and this model has no start token: give -p or -f some text")
    return tokens


def _read_stdin() -> bytes:
    # Python sets stdin to None if its descriptor is closed at the start.
    return sys.stdin.buffer.read() if sys.stdin is not None else b""


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); convert it first"
        ) from None
