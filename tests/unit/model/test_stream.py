import pytest

from pyggml_repkv.model.stream import StreamDecoder


def stream() -> StreamDecoder:
    """A decoder whose token ids are bytes."""
    return StreamDecoder(lambda token: bytes([token]))


def pushed(data: bytes) -> list[str]:
    decoder = stream()
    return [*map(decoder.push, data), decoder.flush()]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"ab", ["a", "b", ""]),
        ("é".encode(), ["", "é", ""]),
        ("你".encode(), ["", "", "你", ""]),
        ("😀".encode(), ["", "", "", "😀", ""]),
        (b"\xff", ["\ufffd", ""]),  # no character starts so
        (b"\x80", ["\ufffd", ""]),
        (b"\xc0\x80", ["\ufffd", "\ufffd", ""]),  # overlong
        (b"\xe4\xbdA", ["", "", "\ufffdA", ""]),  # broken off
        (b"\xe4\xe4\xbd\xa0", ["", "\ufffd", "", "你", ""]),
        (b"\xed\xa0\x80", ["", "\ufffd\ufffd", "\ufffd", ""]),  # a surrogate, which its second byte shows
        (b"\xf0\x9f\x98", ["", "", "", "\ufffd"]),
    ],
)
def test_characters_come_when_they_are_certain(data: bytes, expected: list[str]) -> None:
    assert pushed(data) == expected
    assert "".join(expected) == data.decode("utf-8", "replace")


def test_one_token_may_hold_many_characters() -> None:
    decoder = StreamDecoder({0: b"na\xc3", 1: b"\xafve \xf0\x9f", 2: b"\x98\x80!"}.__getitem__)
    assert [decoder.push(i) for i in range(3)] == ["na", "ïve ", "😀!"]


def test_flush_makes_ready_for_another_text() -> None:
    decoder = stream()
    decoder.push(0xE4)
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert [decoder.push(byte) for byte in "é".encode()] == ["", "é"]
