"""The prompt: the text of -f and -p, put into the chat template, as token ids."""

from __future__ import annotations

import argparse
import codecs
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyggml_repkv.errors import InputError

if TYPE_CHECKING:
    from pyggml_repkv.engine.model import Model


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
    """Returns the text of the UTF-8 file `name`, given with `flag`, without a byte order mark.

    Raises InputError if it cannot be read.
    """
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
    if args.chat and not prompt:
        raise InputError("--chat needs a message: -p TEXT or -f FILE is empty")


def tokenize(args: argparse.Namespace, prompt: str, model: Model) -> tuple[str, list[int]]:
    """Returns the prompt, as the user's message in the model's template with --chat, and its token ids.

    Raises InputError if there are no ids, or no template.
    """
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        prompt, tokens = model.chat_prompt(messages)
    else:
        tokens = model.tokenizer.encode(prompt, parse_special=not args.no_parse_special)
    if not tokens:
        raise InputError("the prompt is empty, and this model has no start token: give -p or -f some text")
    return prompt, tokens


def _read_stdin() -> bytes:
    # Python sets stdin to None if its descriptor is closed at the start.
    return sys.stdin.buffer.read() if sys.stdin is not None else b""


def _decoded(data: bytes, source: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{source}: UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); convert it first"
        ) from None
