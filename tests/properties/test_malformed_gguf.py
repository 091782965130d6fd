"""Damaged model files end in a clear refusal or a model that runs: never a signal, a traceback or a hang.

A worker process opens mutants of a tiny model, because an abort in C would end the test runner too.
"""

import json
import logging.handlers
import os
import random
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFValueType as ValueType

from pyggml_repkv.engine.model import Model
from pyggml_repkv.errors import RepkvError
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.model.chat_template import ChatTemplate
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.tensors import check_tensors
from pyggml_repkv.model.tokenizer import Tokenizer
from tests.tiny_models import (
    OPTIONAL,
    Metadata,
    Packed,
    Tensors,
    TinySpec,
    write_split_model,
    write_tiny_model,
)

ROOT = Path(__file__).parents[2]
ADDRESS_SPACE = 4 * 2**30  # bytes
SECONDS_PER_MUTANT = 30
MAX_MESSAGE = 600  # characters
SPEC = TinySpec(
    n_layer=1,
    n_head=2,
    n_head_kv=1,
    head_dim=16,
    n_ff=32,
    n_vocab=276,
    n_ctx=64,
    weight_type=QuantType.Q8_0,
    scaling_kind="yarn",
    scaling_factor=2.0,
)
SPECS = {
    "qwen2": SPEC,
    "llama": replace(SPEC, arch="llama", optional=OPTIONAL["llama"], joined=True),
    "qwen2-loose": SPEC,
}


def loosen(metadata: Metadata, tensors: Tensors) -> None:
    """What a file may lack or have too much of."""
    del metadata["tokenizer.ggml.pre"]
    merges, kind = metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.merges"] = ([merge.split(" ") for merge in merges], kind)
    metadata["tokenizer.ggml.bos_token_id"] = (2**32 - 1, ValueType.UINT32)
    metadata["tokenizer.ggml.scores"] = ([0.5] * SPEC.n_vocab, kind)
    metadata["qwen2.attention.scale"] = (1.0, ValueType.FLOAT32)
    metadata["split.no"], metadata["split.count"] = (0, ValueType.UINT16), (2, ValueType.UINT16)
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = Packed(np.concatenate([tensors[name].data, tensors[name].data[:3]]), tensors[name].type)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.bias"):
        tensors[name] = Packed(tensors[name].data.astype(np.float16), QuantType.F16)
    biases = [tensors.pop(f"blk.0.attn_{part}.bias").data.astype(np.float32) for part in "qkv"]
    tensors["blk.0.attn_qkv.bias"] = Packed(np.concatenate(biases), QuantType.F32)
    tensors["notes.weight"] = Packed(np.zeros(3, np.float32), QuantType.F32)
    metadata["split.tensors.count"] = (len(tensors), ValueType.INT32)


@dataclass(frozen=True)
class Field:
    """A little-endian number of `width` bytes at byte `at` of the header."""

    what: str
    at: int
    width: int


@dataclass(frozen=True)
class Mutant:
    name: str
    content: bytes


SCALAR_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def header_fields(raw: bytes) -> tuple[list[Field], int]:
    """Every number in the header of a sound file, and where the header ends."""
    fields: list[Field] = []
    at = 0

    def number(what: str, width: int) -> int:
        nonlocal at
        fields.append(Field(what, at, width))
        at += width
        return int.from_bytes(raw[at - width : at], "little")

    def string(what: str) -> str:
        nonlocal at
        length = number(f"length of {what}", 8)
        at += length
        return raw[at - length : at].decode()

    def value(what: str, kind: int) -> None:
        if kind == 8:
            string(what)
        elif kind == 9:
            item = number(f"item type of {what}", 4)
            for i in range(number(f"count of {what}", 8)):
                value(f"{what}[{i}]", item)
        else:
            number(what, SCALAR_WIDTHS[kind])

    number("magic", 4)
    number("version", 4)
    n_tensors, n_keys = number("tensor count", 8), number("key count", 8)
    for i in range(n_keys):
        key = string(f"key {i}")
        value(key, number(f"type of {key}", 4))
    for i in range(n_tensors):
        name = string(f"tensor {i}")
        for d in range(number(f"n_dims of {name}", 4)):
            number(f"dimension {d} of {name}", 8)
        number(f"type of {name}", 4)
        number(f"offset of {name}", 8)
    return fields, at


def field_mutants(raw: bytes, rng: random.Random) -> Iterator[Mutant]:
    """Every number in the header (few of the vocabulary's), set to values chosen to do harm."""
    fields, _ = header_fields(raw)
    items = [field for field in fields if "[" in field.what]
    for field in [field for field in fields if "[" not in field.what] + rng.sample(items, min(30, len(items))):
        old = int.from_bytes(raw[field.at : field.at + field.width], "little")
        top = 2 ** (8 * field.width)
        new = {0, 1, old - 1, old + 1, old * 2, top - 1, top // 2, top // 2 - 1, rng.randrange(top)}
        # Lengths that just fit and products that wrap are the classic ways past a check.
        new |= {len(raw) - field.at, 2**32, 2**62 + 1} if field.width == 8 else {9, 40}
        for bad in rng.sample(sorted(n for n in new if 0 <= n < top and n != old), 3):
            content = raw[: field.at] + bad.to_bytes(field.width, "little") + raw[field.at + field.width :]
            yield Mutant(f"{field.what} = {bad}", content)


def random_mutants(raw: bytes, rng: random.Random) -> Iterator[Mutant]:
    """Flipped, cut, doubled and overwritten bytes, most of them in the header."""
    _, n_header = header_fields(raw)
    for i in range(160):
        flipped = bytearray(raw)
        places = [rng.randrange(n_header if i % 4 else len(raw)) for _ in range(rng.choice((1, 1, 2, 8)))]
        for at in places:
            flipped[at] ^= 1 << rng.randrange(8)
        yield Mutant(f"bits flipped at {places}", bytes(flipped))
    for _ in range(60):
        size = rng.choice((rng.randrange(n_header), rng.randrange(len(raw)), rng.randrange(64)))
        yield Mutant(f"cut to {size} bytes", raw[:size])
    for _ in range(40):
        at, size = rng.randrange(n_header), rng.randrange(1, 64)
        yield Mutant(f"{size} bytes removed at {at}", raw[:at] + raw[at + size :])
        yield Mutant(f"{size} bytes doubled at {at}", raw[: at + size] + raw[at:])
    for byte in (0x00, 0xFF, 0x0A, 0x80):
        for _ in range(10):
            at, size = rng.randrange(n_header), rng.randrange(1, 64)
            content = raw[:at] + bytes([byte]) * size + raw[at + size :]
            yield Mutant(f"{size} bytes of {byte:#x} at {at}", content)


def special_mutants(raw: bytes) -> Iterator[Mutant]:
    fields, n_header = header_fields(raw)
    tensor_data = -(-n_header // 32) * 32
    yield Mutant("weights all NaN", raw[:tensor_data] + b"\xff" * (len(raw) - tensor_data))
    yield Mutant("trailing bytes", raw + bytes(100))
    offsets = [field for field in fields if field.what.startswith("offset of")]
    for first, second in pairwise(offsets):
        content = bytearray(raw)
        content[second.at : second.at + 8] = raw[first.at : first.at + 8]
        yield Mutant(f"{second.what} = {first.what}", bytes(content))
    for a, b in (
        (b"qwen2.", b"qwen3."),
        (b"attn_q.bias", b"attn_p.bias"),
        (b"gpt2", b"bert"),
        (b"yarn", b"none"),
    ):
        yield Mutant(f"{a!r} for {b!r}", raw.replace(a, b))
    yield Mutant("tokens not UTF-8", raw.replace("Ġthe".encode(), b"\xc4\xff\xfe\x80e"))


def run_worker() -> None:
    """Read paths of mutants from stdin; answer each with a line of JSON: [how it ended, message]."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings = logging.handlers.BufferingHandler(1000)
    logging.getLogger("pyggml_repkv").addHandler(warnings)
    for line in sys.stdin:
        try:
            warnings.flush()
            open_and_run(Path(line.rstrip("\n")))
            assert all(record.getMessage().isprintable() for record in warnings.buffer)
            answer = ["ok", ""]
        except RepkvError as error:
            answer = ["refused", str(error)]
        except BaseException:
            answer = ["crashed", traceback.format_exc()]
        print(json.dumps(answer), flush=True)


def open_and_run(path: Path) -> None:
    """Runs every step of loading by itself, then a whole load and a few tokens."""
    file = GGUFFile.open(path)
    check_tensors(file, ModelConfig.from_gguf(file))
    tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode("the <|im_end|> tin", parse_special=True)
    tokenizer.decode(ids)
    template = ChatTemplate.from_metadata(file.metadata, tokenizer)
    if template is not None:
        template.render([{"role": "user", "content": "hello"}])
    with Model.load(path, threads=1) as model, model.session(MemoryConfig(kv="full", n_ctx=32)) as session:
        session.prefill(ids[:20])
        session.decode(ids[0])


@dataclass(frozen=True)
class Answer:
    end: str
    message: str

    @property
    def is_clear(self) -> bool:
        """Whether the model ran, or was refused in one line."""
        refused = self.end == "refused" and self.message.isprintable() and 10 < len(self.message) < MAX_MESSAGE
        return self.end == "ok" or refused


class Worker:
    """A process that opens mutants one after another."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ask(self, path: Path) -> Answer:
        """Returns how `path` ended; after an abort, the message is ggml's output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{path}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return Answer(f"died with {self.process.wait()}", "")
        if not select.select([self.process.stdout], [], [], SECONDS_PER_MUTANT)[0]:
            return Answer("hung", f"no answer in {SECONDS_PER_MUTANT} s")
        line = self.process.stdout.readline()
        try:
            return Answer(*json.loads(line))
        except ValueError:
            # At the end of its input, a worker that only printed something ends; a worker that hangs is killed.
            self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_PER_MUTANT)
            self.process.kill()
            output = line + self.process.stdout.read()
            return Answer(f"died with {self.process.wait()}", output.decode(errors="replace"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def mutants(raw: bytes) -> list[Mutant]:
    rng = random.Random(6674)
    return [*field_mutants(raw, rng), *random_mutants(raw, rng), *special_mutants(raw)]


@pytest.fixture(scope="module", params=SPECS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / f"{request.param}.gguf"
    write_tiny_model(path, SPECS[request.param], loosen if request.param.endswith("loose") else None)
    return path


def test_fields_are_all_found(sound: Path) -> None:
    raw = sound.read_bytes()
    fields, end = header_fields(raw)
    by_name = {f.what: int.from_bytes(raw[f.at : f.at + f.width], "little") for f in fields}
    file = GGUFFile.open(sound)
    assert by_name[f"{sound.stem.partition('-')[0]}.embedding_length"] == 32
    assert by_name["count of tokenizer.ggml.tokens"] == SPEC.n_vocab
    assert all(f"offset of {name}" in by_name for name in file.tensors)
    assert min(tensor.offset for tensor in file.tensors.values()) - end in range(32)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGABRT, "died with -6"), (signal.SIGSTOP, "hung")])
def test_dead_and_hung_workers_are_noticed(
    sound: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, end: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS_PER_MUTANT", 1)
    worker = Worker()
    worker.process.send_signal(number)
    try:
        answer = worker.ask(sound)
    finally:
        worker.close()
    assert answer.end == end
    assert not answer.is_clear


def test_damaged_files_are_refused_or_run(sound: Path, tmp_path: Path) -> None:
    batch = mutants(sound.read_bytes())
    assert len(batch) >= 500
    n_ok = n_clear_ends(sound, batch, tmp_path / "mutant.gguf", tmp_path / "mutant.gguf")
    # Both ends must be reached, or the mutants test nothing.
    assert n_ok > 80
    assert len(batch) - n_ok > 300


@pytest.mark.parametrize("part", [0, 1, 2])
def test_damaged_parts_are_refused_or_run(tmp_path: Path, part: int) -> None:
    """Every number in the header of a part, and its bytes at random, with the other parts sound."""
    parts = write_split_model(tmp_path / "m", SPEC, max_tensors=6)
    assert len(parts) == 3
    raw = parts[part].read_bytes()
    rng = random.Random(part)
    batch = [*field_mutants(raw, rng), *list(random_mutants(raw, rng))[::4]]
    n_ok = n_clear_ends(parts[0], batch, parts[part], parts[0])
    assert n_ok > 5
    assert len(batch) - n_ok > 50


def n_clear_ends(sound: Path, batch: list[Mutant], place: Path, opened: Path) -> int:
    """How many mutants run when each lies at `place` and the model `opened` is opened; asserts that the others are
    refused.
    """
    worker = Worker()
    answers: list[Answer] = []
    wrong: list[str] = []
    try:
        assert worker.ask(sound) == Answer("ok", "")
        for mutant in batch:
            place.write_bytes(mutant.content)
            answer = worker.ask(opened)
            answers.append(answer)
            if not answer.is_clear:
                wrong.append(f"{mutant.name}: {answer}")
                worker.close()
                worker = Worker()
    finally:
        worker.close()
    assert not wrong, "\n".join(wrong)
    return sum(answer.end == "ok" for answer in answers)


if __name__ == "__main__":
    run_worker()
