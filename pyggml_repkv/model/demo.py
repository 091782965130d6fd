"""The demo model: SmolLM2-135M-Instruct re-expressed as a qwen2 model.

SmolLM2 is a llama-architecture model without biases. It differs from a qwen2 one in two things: the names of its keys,
and the order of its query and key rows, which are permuted for RoPE by pairs. So the keys are renamed and the rows of
each head put back in the order for RoPE by halves; quantised rows move whole, and nothing else changes.
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from pyggml_repkv.arch.llama import LLAMA
from pyggml_repkv.arch.qwen2 import QWEN2
from pyggml_repkv.errors import InputError, RepkvError
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.disk_space import need_space
from pyggml_repkv.model.gguf_file import GGUFFile, file_error, printable
from pyggml_repkv.model.tensors import check_tensors

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.qwen2.gguf"


def convert_smollm2(src: Path, dst: Path) -> None:
    """Write the llama-architecture model `src` to `dst` as the qwen2 model that computes the same.

    `dst` appears complete or not at all. Raises ModelFileError if `src` is no plain llama model, RepkvError
    if `dst` cannot be written.
    """
    file = GGUFFile.open(src)
    config = ModelConfig.from_gguf(file)
    if config.arch != LLAMA.name:
        raise file_error(src, f"its architecture is {config.arch!r}", "SmolLM2 is a 'llama' model")
    unused = check_tensors(file, config)
    if unused or len(file.parts) > 1 or any(_is_more_than_plain(name) for name in file.tensors):
        raise file_error(src, "is no plain llama model", "SmolLM2 is what can be converted")
    data = np.array(file.parts[0])
    _rename_keys(file, data)
    for name, info in file.tensors.items():
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            n_head = config.n_head if name.endswith(".attn_q.weight") else config.n_head_kv
            # The rows of each head from pairs to halves: [n_head, d / 2, 2, row] -> [n_head, 2, d / 2, row].
            pairs = data[info.offset : info.offset + info.n_bytes].reshape(n_head, config.head_dim // 2, 2, -1)
            pairs[...] = pairs.swapaxes(1, 2).reshape(pairs.shape).copy()
    _write_whole(dst, data)


def _is_more_than_plain(name: str) -> bool:
    return name.endswith(".bias") or ".attn_qkv." in name or name == "rope_freqs.weight"


def _rename_keys(file: GGUFFile, data: np.ndarray) -> None:
    """Puts one family's name in the place of the other's, which is as long, in the header of the file's `data`."""
    old, new = (np.frombuffer(arch.name.encode(), np.uint8) for arch in (LLAMA, QWEN2))
    for key, (start, end) in file.value_spans.items():
        # A key ends where its value's type starts, a string where its value ends.
        at = end - len(old) if key == "general.architecture" else start - len(key.encode())
        if key == "general.architecture" or key.startswith(f"{LLAMA.name}."):
            data[at : at + len(new)] = new


def _write_whole(dst: Path, data: np.ndarray) -> None:
    """Write `data` to a new file beside `dst` and rename it when it is on the disk."""
    temporary = dst.with_name(f".making-{os.getpid()}-{dst.name}")
    try:
        if dst.is_dir():
            raise InputError(f"{printable(dst, 400)}: is a directory; give the name of a file")
        need_space(dst.parent, data.nbytes)
        with open(temporary, "wb") as out:
            out.write(data.data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, dst)
    except OSError as error:
        raise RepkvError(
            f"{printable(dst, 400)}: cannot be written: {error.strerror}; check the folder and its free space"
        ) from None
    finally:
        with suppress(OSError):  # what made the writing fail may make this fail too
            temporary.unlink(missing_ok=True)
