"""Token ids are llama.cpp's, for both vocabularies."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.names import find_model
from pyggml_repkv.model.tokenizer import CHUNK, Tokenizer

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
VOCABULARIES = ("qwen2", "smollm")

pytestmark = pytest.mark.skipif(not (GOLDEN / "tokenizer.json").exists(), reason=f"no golden files in {GOLDEN}")


@cache
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@cache
def tokenizer(vocabulary: str) -> Tokenizer:
    path = GOLDEN / "qwen2-vocab.gguf" if vocabulary == "qwen2" else find_model("demo")
    tokenizer = Tokenizer.from_metadata(GGUFFile.open(path).metadata)
    tokenizer.normalizes = False  # as in llama.cpp
    return tokenizer


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ["special", "plain"])
def test_ids_are_identical(vocabulary: str, kind: str) -> None:
    expected = golden()[vocabulary][kind]
    assert len(expected) == len(golden()["texts"]) > 30
    for text, ids in zip(golden()["texts"], expected, strict=True):
        got = tokenizer(vocabulary).encode(text, add_special=False, parse_special=kind == "special")
        assert got == ids, text


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ["special", "plain"])
def test_ids_decode_and_stream_to_the_texts(vocabulary: str, kind: str) -> None:
    for text, ids in zip(golden()["texts"], golden()[vocabulary][kind], strict=True):
        stream = tokenizer(vocabulary).stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
        assert tokenizer(vocabulary).decode(ids) == text


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_long_text_has_the_same_ids_in_chunks(vocabulary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(golden()["texts"]) * 40
    assert len(text) > 2 * CHUNK
    ids = tokenizer(vocabulary).encode(text)
    monkeypatch.setattr("pyggml_repkv.model.tokenizer.CHUNK", len(text))
    assert ids == tokenizer(vocabulary).encode(text)


def test_what_the_files_say_of_start_and_end() -> None:
    qwen2, smollm = map(tokenizer, VOCABULARIES)
    assert (qwen2.n_vocab, qwen2.bos_id, qwen2.eos_id, qwen2.add_bos) == (152064, 151646, 151643, True)
    assert (smollm.n_vocab, smollm.bos_id, smollm.eos_id, smollm.add_bos) == (49152, 1, 2, False)
    # As llama.cpp (llama-cpp-python 0.3.36) lists them; the first one is </s>, by its text.
    assert qwen2.eog_ids == {128247, 151643, 151662, 151663, 151664}
    assert smollm.eog_ids == {0, 2, 4}
