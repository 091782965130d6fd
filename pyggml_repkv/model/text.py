"""What is done to text before and while a tokenizer cuts it into words."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread


def valid_text(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced, as UTF-8 has neither."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def unmask(text: str, masks: Mapping[str, str]) -> str:
    """`text` with every character of `masks` replaced by what it stands for."""
    for mask, char in masks.items():
        text = text.replace(mask, char)
    return text


def apart(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """`encode(text)` in a thread that nobody waits for after Ctrl-C; the encoder does without the interpreter."""
    future: Future[list[int]] = Future()

    def work() -> None:
        try:
            future.set_result(encode(text))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result()
