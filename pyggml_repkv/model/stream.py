"""Tokens in, text out, one at a time and never half a character."""

from codecs import getincrementaldecoder
from collections.abc import Callable

_SURROGATE_START = b"\xed\xa0"


class StreamDecoder:
    """Decodes tokens whose bytes may begin or end inside a character.

    Everything that `push` and then `flush` return, joined, is what the bytes of all tokens decode to at once.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """`bytes_of` gives the bytes of a token id."""
        self._bytes_of = bytes_of
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; bytes that cannot be UTF-8 become U+FFFD."""
        text = self._decoder.decode(self._bytes_of(token))
        # Python waits for the third byte of a surrogate, for the sake of error handlers other than ours.
        if _SURROGATE_START <= self._decoder.getstate()[0] < b"\xee":
            text += self._decoder.decode(b"", final=True)
        return text

    def flush(self) -> str:
        """What was held back, as U+FFFD, at the end of the tokens; then ready for another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
