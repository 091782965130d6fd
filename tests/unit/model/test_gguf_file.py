import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFValueType as ValueType
from hypothesis import given, settings

from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.model.gguf_file import GGUFFile, printable
from tests.tiny_models import TinySpec, tiny_specs, write_tiny_model

HUGE = 2**63


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def u32_key(name: str, value: int) -> bytes:
    return key(name, ValueType.UINT32, struct.pack("<I", value))


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, ne: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def model(keys: list[bytes], tensors: list[bytes], n_data: int = 0) -> bytes:
    """A whole file of the given records and `n_data` zero bytes of tensor data."""
    head = header(tensors=len(tensors), keys=len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(n_data)


def assert_equals_reader(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    file = GGUFFile.open(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        value = file.metadata[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), name
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for expected in reader.tensors:
        info = file.tensors[expected.name]
        assert info.shape == tuple(int(n) for n in reversed(expected.shape))
        assert (info.type, info.offset, info.n_bytes) == (
            expected.tensor_type,
            expected.data_offset,
            expected.n_bytes,
        )
        assert bytes(file.tensor_bytes(expected.name)) == expected.data.tobytes()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spec=tiny_specs())
def test_equals_gguf_reader(tmp_path_factory: pytest.TempPathFactory, spec: TinySpec) -> None:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_model(path, spec)
    assert_equals_reader(path)


def test_every_value_type_equals_gguf_reader(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1e-6)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("no", False)
    writer.add_bool("yes", True)
    writer.add_string("text", "zwölf Boxkämpfer 🥊")
    writer.add_array("ints", [1, -2])
    writer.add_array("floats", [0.5])
    writer.add_array("bools", [True, False])
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("bytes", b"\x00\xff")
    writer.add_custom_alignment(64)
    writer.add_tensor("odd", np.arange(7, dtype=np.float32))
    writer.add_tensor("four", np.ones((2, 3, 4, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equals_reader(path)
    metadata = GGUFFile.open(path).metadata
    assert type(metadata["yes"]) is bool
    assert type(metadata["u64"]) is int
    assert metadata["bools"].dtype == np.bool_
    assert metadata["ints"].dtype == np.int32


def test_reads_version_2_the_same(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    write_tiny_model(path, TinySpec())
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert GGUFFile.open(path).version == 2
    assert_equals_reader(path)


def test_header_of_100k_strings_parses_fast(tmp_path: Path) -> None:
    texts = b"".join(string(f"token-{i}") for i in range(100_000))
    path = tmp_path / "large.gguf"
    path.write_bytes(model([key("tokens", ValueType.ARRAY, array(ValueType.STRING, 100_000, texts))], []))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        file = GGUFFile.open(path)
        seconds.append(time.perf_counter() - start)
    assert file.metadata["tokens"][99_999] == "token-99999"
    assert min(seconds) < 0.15


def test_data_is_mapped_read_only(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, TinySpec())
    file = GGUFFile.open(path)
    view = file.tensor_bytes("output_norm.weight")
    assert np.shares_memory(view, file.parts[0])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_array_strings_keep_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    raw = b"\xff\xfe tail"
    path = tmp_path / "odd.gguf"
    texts = key("tokens", ValueType.ARRAY, array(ValueType.STRING, 1, string(raw)))
    path.write_bytes(model([texts, key("name", ValueType.STRING, string(raw))], []))
    metadata = GGUFFile.open(path).metadata
    assert metadata["tokens"][0].encode("utf-8", "surrogateescape") == raw
    assert metadata["name"] == "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} tail"


def test_arrays_of_arrays_are_lists(tmp_path: Path) -> None:
    pairs = array(9, 2, array(8, 2, string("a") + string("b")) + array(5, 2, struct.pack("<ii", 3, -4)))
    path = tmp_path / "nested.gguf"
    path.write_bytes(model([key("pairs", ValueType.ARRAY, pairs), u32_key("next", 1)], []))
    words, numbers = GGUFFile.open(path).metadata["pairs"]
    assert words == ["a", "b"]
    assert numbers.tolist() == [3, -4]
    assert GGUFFile.open(path).metadata["next"] == 1


def test_value_spans_cover_type_and_value(tmp_path: Path) -> None:
    path = tmp_path / "spans.gguf"
    path.write_bytes(model([u32_key("one", 7), key("two", ValueType.STRING, string("abc"))], []))
    file = GGUFFile.open(path)
    cut = {name: bytes(file.parts[0][start:end]) for name, (start, end) in file.value_spans.items()}
    assert cut == {"one": struct.pack("<II", 4, 7), "two": struct.pack("<I", 8) + string("abc")}


F32 = int(QuantType.F32)
BAD_FILES = {
    "empty": (b"", "is empty"),
    "short magic": (b"GG", "not a GGUF file"),
    "other magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "cut in version": (b"GGUF\x03\x00", "the version at byte 4"),
    "cut in counts": (header()[:-1], "the key count"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 0": (header(version=0), "big-endian GGUF or damaged"),
    "version 1": (header(version=1), "version 1, versions 2 to 3"),
    "version 4": (header(version=4), "version 4"),
    "tensor count": (header(tensors=2**64 - 1) + bytes(64), "claims 18446744073709551615 tensors"),
    "key count": (header(keys=10**9) + bytes(64), "1000000000 keys"),
    "one key too few": (header(keys=2) + u32_key("a", 1) + bytes(8), "key 1|claims"),
    "key length": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(64), "needs 9223372036854775808 bytes"),
    "long key": (model([u32_key("k" * 70_000, 1)], []), "at most 65535"),
    "key not utf-8": (model([key(b"\xff\n", 4, bytes(4))], []), "is not UTF-8"),
    "key twice": (model([u32_key("a", 1), u32_key("a", 2)], []), "key a appears twice"),
    "value type": (model([key("a", 13, bytes(8))], []), "unknown value type 13"),
    "string length": (model([key("a", 8, struct.pack("<Q", 2**40))], []), "needs 1099511627776 bytes"),
    "boolean": (model([key("a", 7, b"\x02")], []), "a boolean is 0 or 1"),
    "booleans": (model([key("a", 9, array(7, 2, b"\x01\x80"))], []), "a boolean is 0 or 1"),
    "array type": (model([key("a", 9, array(99, 1))], []), "unknown value type 99"),
    "key without a name": (model([u32_key("", 1)], []), "key 0 has no name"),
    "deep arrays": (model([key("a", 9, array(9, 1, array(9, 1, array(4, 0))))], []), "array of arrays of arrays"),
    "array of arrays count": (model([key("a", 9, array(9, 2**62))], []), "claims 4611686018427387904 arrays"),
    "cut in an array of arrays": (header(keys=1) + key("a", 9, array(9, 1, array(8, 1))), "cut off|needs|claims"),
    "array count": (model([key("a", 9, array(5, 2**62))], []), "needs 18446744073709551616 bytes"),
    "string count": (model([key("a", 9, array(8, 2**61))], []), "claims 2305843009213693952 strings"),
    "string in array": (model([key("a", 9, array(8, 1, struct.pack("<Q", HUGE)))], []), "string 0 of key a"),
    "cut in strings": (header(keys=1) + key("a", 9, array(8, 2, string("x" * 8))), "cut off after 1 of 2"),
    "alignment 0": (model([u32_key("general.alignment", 0)], []), "power of two"),
    "alignment 48": (model([u32_key("general.alignment", 48)], []), "power of two"),
    "alignment 1": (model([u32_key("general.alignment", 1)], []), "at least 8"),
    "alignment type": (model([key("general.alignment", 8, string("\n32"))], []), "power of two"),
    "alignment array": (model([key("general.alignment", 9, array(4, 0))], []), "power of two"),
    "name length": (model([], [tensor("t" * 64, (4,))], 32), "at most 63"),
    "name not utf-8": (model([], [tensor(b"\xc3\x28", (4,))], 32), "is not UTF-8"),
    "no dimension": (model([], [tensor("t", ()) + bytes(8)], 32), "0 dimensions"),
    "five dimensions": (model([], [tensor("t", (1, 1, 1, 1, 1))], 32), "5 dimensions"),
    "dimension 0": (model([], [tensor("t", (4, 0))], 32), "impossible shape"),
    "overflow": (model([], [tensor("t", (2**32, 2**32))], 32), "impossible shape"),
    "wrap to 0": (model([], [tensor("t", (2**32, 2**32, 2**32, 2**32))], 32), "impossible shape"),
    "tensor type": (model([], [tensor("t", (4,), 4)], 32), "unknown type 4"),
    "row": (model([], [tensor("t", (33,), int(QuantType.Q8_0))], 64), "a multiple of 32"),
    "unaligned": (model([], [tensor("t", (4,), F32, 4)], 64), "not a multiple of 32"),
    "outside": (model([], [tensor("t", (4,), F32, 2**63)], 64), "ends at byte"),
    "truncated data": (model([], [tensor("t", (16,))], 63), "ends at byte"),
    "tensor twice": (model([], [tensor("t", (8,)), tensor("t", (8,), F32, 32)], 64), "t appears twice"),
    "overlap": (model([], [tensor("a", (16,)), tensor("b", (8,), F32, 32)], 96), "a and b overlap"),
    "same place": (model([], [tensor("a", (8,)), tensor("b", (8,))], 96), "a and b overlap"),
    "cut in tensors": (header(tensors=1) + tensor("t" * 30, (4,))[:-2], "tensor t"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=expected) as caught:
        GGUFFile.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such file"),
        (Path.mkdir, "is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be opened"),
    ],
    ids=["missing", "directory", "fifo", "symlink loop"],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    path = tmp_path / "odd\nname.gguf"
    make(path)
    with pytest.raises(ModelFileError, match=expected) as caught:
        GGUFFile.open(path)
    assert str(caught.value).isprintable()


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(header())

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may read anything, so the refusal cannot come from the file's mode.
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ModelFileError, match="Permission denied; check the path and its permissions"):
        GGUFFile.open(path)


def test_printable_escapes_and_cuts() -> None:
    assert printable("a\x1b[31m\nb\udcff") == "a\\x1b[31m\\nb\\udcff"
    assert printable("x" * 100, 10) == "xxxxxxx..."
    assert printable("x" * 10, 10) == "x" * 10
