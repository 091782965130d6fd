"""Models split into several files: loaded as one from the first, refused in one line where the parts do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType as VT

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import ModelFileError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from tests.tiny_models import Metadata, Tensors, TinySpec, write_split_model, write_tiny_model

SPEC = TinySpec(weight_types=(("blk.1.*", QT.Q8_0),), seed=4)
PROMPT = list(range(40))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return write_split_model(tmp_path / "m", SPEC)


def logits_of(path: Path, **options: bool) -> np.ndarray:
    with Model.load(path, threads=2, **options) as model, model.session(MemoryConfig(n_ctx=64)) as session:
        return np.concatenate([session.prefill_all(PROMPT), session.prefill_all([1, 2]), [session.decode(3)]])


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"exact_graph": True}], ids=["fused", "exact"])
def test_a_split_model_is_the_whole_one(tmp_path: Path, small_first: bool, options: dict[str, bool]) -> None:
    parts = write_split_model(tmp_path / "m", SPEC, small_first=small_first)
    write_tiny_model(tmp_path / "whole.gguf", SPEC)
    file, whole = GGUFFile.open(parts[0]), GGUFFile.open(tmp_path / "whole.gguf")
    assert len(file.parts) == len(parts) == (4 if small_first else 3)
    assert file.n_bytes == sum(path.stat().st_size for path in parts)
    assert file.tensors.keys() == whole.tensors.keys()
    assert (file.tensors["token_embd.weight"].part > 0) == small_first
    for name in file.tensors:
        assert np.array_equal(file.tensor_bytes(name), whole.tensor_bytes(name)), name
    assert np.array_equal(logits_of(parts[0], **options), logits_of(tmp_path / "whole.gguf", **options))


def test_every_part_counts(parts: list[Path]) -> None:
    with Model.load(parts[0], threads=1) as model:
        assert model.weight_bytes >= sum(path.stat().st_size for path in parts)
        before = model.fingerprint
    file = GGUFFile.open(parts[0])
    last = max(file.tensors.values(), key=lambda info: (info.part, info.offset))
    content = bytearray(parts[last.part].read_bytes())
    content[last.offset] ^= 1
    parts[last.part].write_bytes(content)
    with Model.load(parts[0], threads=1) as model:
        assert model.fingerprint != before


def test_pages_of_every_part_are_released(parts: list[Path]) -> None:
    file = GGUFFile.open(parts[0])
    want = file.tensor_bytes("output.weight").copy()
    file.release_pages()
    assert np.array_equal(file.tensor_bytes("output.weight"), want)


def again(path: Path, key: str, value: int, width: int = 2) -> None:
    """Overwrites the number of a key in the header."""
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    content[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(content)


def renamed_first(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("model.gguf"))


def second_is_first(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[1])


def tensor_twice(parts: list[Path]) -> None:
    tensors = GGUFFile.open(parts[0]).tensors.values()
    first, second = ({info.name.encode() for info in tensors if info.part == part} for part in (0, 1))
    ours, theirs = next((a, b) for a in sorted(second) for b in sorted(first) if len(a) == len(b))
    parts[1].write_bytes(parts[1].read_bytes().replace(ours, theirs))


def joined(parts: list[Path]) -> Path:
    parts[0].write_bytes(b"".join(path.read_bytes() for path in parts))
    return parts[0]


WRONG: dict[str, tuple[Callable[[list[Path]], Path | None], str]] = {
    "a part is missing": (lambda p: p[1].unlink(), r"m-00002-of-00003\.gguf: part 2 of 3 is missing; download it"),
    "the second part": (lambda p: p[1], r"m-00002-of-00003.*is part 2 .* 3 files; give the first part, .*m-00001-of-0"),
    "first part renamed": (renamed_first, r"model\.gguf: .*its name must end with -00001-of-00003\.gguf"),
    "a part twice": (second_is_first, r"m-00002-of-00003\.gguf: split\.no is 0 and split\.count 3, not 1 and 3"),
    "wrong number": (lambda p: again(p[2], "split.no", 7), r"m-00003-of-00003\.gguf: split\.no is 7 .* not 2 and 3"),
    "wrong count": (lambda p: again(p[2], "split.count", 4), r"m-00003-of-00003\.gguf: .*split\.count 4, not 2 and 3"),
    "tensors missing": (
        lambda p: again(p[0], "split.tensors.count", 99, 4),
        r"m-00001-of-00003\.gguf: split\.tensors\.count is 99, its parts hold \d+ tensors",
    ),
    "tensor in two parts": (tensor_twice, r"m-00002-of-00003\.gguf: tensor blk\S+ is in m-00001-of-00003\.gguf too"),
    "joined by cat": (joined, r"m-00001-of-00003\.gguf: .*joined with `cat`"),
    "damaged part": (lambda p: p[1].write_bytes(b"GGUF"), r"m-00002-of-00003\.gguf: the version"),
    "part is a folder": (lambda p: (p[1].unlink(), p[1].mkdir())[1], r"m-00002-of-00003\.gguf: is a directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_refused_in_one_line(parts: list[Path], name: str) -> None:
    damage, expected = WRONG[name]
    path = damage(parts)
    with pytest.raises(ModelFileError, match=expected) as caught:
        GGUFFile.open(path if isinstance(path, Path) else parts[0])
    assert str(caught.value).isprintable()


def with_split(path: Path, n_tensors: int, count: object, kind: VT = VT.INT32) -> Path:
    def edit(metadata: Metadata, tensors: Tensors) -> None:
        metadata["split.no"] = (0, VT.UINT16)
        metadata["split.count"] = (count, kind)
        metadata["split.tensors.count"] = (len(tensors) + n_tensors, VT.INT32)

    write_tiny_model(path, SPEC, edit)
    return path


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_whole_model_may_keep_the_keys_of_its_parts(tmp_path: Path, count: int) -> None:
    assert len(GGUFFile.open(with_split(tmp_path / "merged.gguf", 0, count)).parts) == 1
    if count == 3:
        with pytest.raises(ModelFileError, match="does not say where the others are"):
            GGUFFile.open(with_split(tmp_path / "first.gguf", 5, count))


@pytest.mark.parametrize(
    ("count", "kind"),
    [(-3, VT.INT32), ("3", VT.STRING), (3.0, VT.FLOAT32), (True, VT.BOOL), ([2, 2], VT.ARRAY), ([[2, 2]], VT.ARRAY)],
)
def test_a_count_of_files_is_a_number(tmp_path: Path, count: object, kind: VT) -> None:
    with pytest.raises(ModelFileError, match=r"split\.count is .*, a number of files is needed"):
        GGUFFile.open(with_split(tmp_path / "m.gguf", 0, count, kind))


@pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
@pytest.mark.parametrize(("value", "kind"), [(None, VT.STRING), ("0", VT.STRING), ([1, 2], VT.ARRAY), (-1, VT.INT32)])
def test_other_numbers_of_a_split_are_numbers(tmp_path: Path, key: str, value: object, kind: VT) -> None:
    first, _ = write_split_model(tmp_path / "m", SPEC, max_tensors=20)

    def edit(metadata: Metadata, tensors: Tensors) -> None:
        for name in tensors.keys() - kept:
            del tensors[name]
        metadata["split.no"] = (0, VT.UINT16)
        metadata["split.count"] = (2, VT.UINT16)
        metadata["split.tensors.count"] = (n_tensors, VT.INT32)
        metadata[key] = (value, kind)
        if value is None:
            del metadata[key]

    file = GGUFFile.open(first)
    n_tensors, kept = len(file.tensors), {info.name for info in file.tensors.values() if info.part == 0}
    write_tiny_model(tmp_path / "edited.gguf", SPEC, edit)
    (tmp_path / "edited.gguf").replace(first)
    with pytest.raises(ModelFileError, match=rf"m-00001-of-00002\.gguf: {key} is ") as caught:
        GGUFFile.open(first)
    assert str(caught.value).isprintable()


def test_names_of_parts_may_be_links(parts: list[Path], tmp_path: Path) -> None:
    """As in the cache of a download tool, where the files themselves have other names."""
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(parts):
        path.rename(tmp_path / "blobs" / f"{i}{i}")
        path.symlink_to(tmp_path / "blobs" / f"{i}{i}")
    assert len(GGUFFile.open(parts[0]).parts) == len(parts)


def test_names_may_end_in_capitals(parts: list[Path]) -> None:
    first, *_ = [path.rename(path.with_suffix(".GGUF")) for path in parts]
    assert len(GGUFFile.open(first).parts) == len(parts)
