"""Runs single native ops: tensors with given values, one graph over them, and numpy to compare with."""

import ctypes
from dataclasses import astuple, dataclass

import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf.quants import dequantize

from pyggml_repkv.ffi.context import GraphContext, Tensor, TensorContext
from pyggml_repkv.ffi.handles import Backend, Buffer, GraphAllocator, aligned_zeros, tensor_array
from pyggml_repkv.ffi.library import g
from pyggml_repkv.memory.regions import Regions
from pyggml_repkv.model.config import ModelConfig, RopeScaling
from pyggml_repkv.ops.kernels import PANEL, Kernels, n_panels
from pyggml_repkv.ops.makers import Ops
from tests.tiny_models import random_matrix


def config(n_embd: int = 64, n_head: int = 4, n_head_kv: int = 2, head_dim: int = 32, n_ff: int = 96,
           rope_dim: int = 0, arch: str = "qwen2") -> ModelConfig:  # fmt: skip
    return ModelConfig(
        arch=arch,
        name="test",
        n_layer=1,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=300,
        rope_base=1e4,
        rope_dim=rope_dim or head_dim,
        rope_scaling=RopeScaling("none", 1.0, 512, 0.0, 1.0),
        norm_eps=1e-5,
        n_ctx_train=512,
        tied_output=True,
    )


@dataclass
class Bench:
    """Tensors with given values, and one graph over them."""

    config: ModelConfig
    n_threads: int

    def __post_init__(self) -> None:
        self.backend = Backend(self.n_threads)
        self.context = TensorContext(32)
        self.graph = GraphContext(256)
        self.kernels = Kernels(self.config, self.backend)
        self.ops = Ops(self.graph, self.kernels)
        self.buffers: list[Buffer] = []

    def tensor(self, values: np.ndarray, kind: int = QT.F32, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of `kind` whose bytes are those of `values`; `shape` where `values` are packed blocks."""
        data = np.ascontiguousarray(values).view(np.uint8).ravel()
        memory = aligned_zeros(-(-data.nbytes // 64) * 64)
        memory[: data.nbytes] = data
        buffer = Buffer.over(memory)
        tensor = self.context.new(int(kind), shape or values.shape)
        buffer.place(tensor, 0)
        self.buffers.append(buffer)
        return tensor

    def integers(self, *values: int) -> Tensor:
        return self.tensor(np.array(values, np.int32), g.GGML_TYPE_I32)

    def regions(self, **values: int) -> Tensor:
        """The input of bounded memories: fields of memory/regions.py."""
        return self.integers(*astuple(Regions(**values)))

    def rotate_by(self, table: np.ndarray) -> None:
        """Ops made from now on rotate by this table."""
        self.ops = Ops(self.graph, self.kernels, self.tensor(table.astype(np.float32)))

    def compute(self, node: Tensor) -> np.ndarray:
        self.graph.output(node)
        allocator = GraphAllocator()
        allocator.allocate(self.graph.graph)
        self.backend.compute(self.graph.native_graph)
        result = tensor_array(node).copy()
        allocator.close()
        return result

    def compute_packed(self, node: Tensor, n_tokens: int) -> np.ndarray:
        """A packed node's value, unpacked: [n_tokens, n]."""
        packed = self.compute(node).reshape(-1, node.contents.ne[1], PANEL)
        return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:n_tokens]


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's memory, [n_rows, bytes of a row]."""
    t = tensor.contents
    raw = np.frombuffer((ctypes.c_char * g.ggml_nbytes(tensor)).from_address(t.data), np.uint8)
    return raw.reshape(-1, t.nb[1]).copy()


def packed(x: np.ndarray, padding: float = np.nan) -> np.ndarray:
    """Returns [P, n, PANEL] for [T, n]; the padding in lanes without a token must not matter."""
    n_tokens, n = x.shape
    full = np.full((n_panels(n_tokens) * PANEL, n), padding, np.float32)
    full[:n_tokens] = x
    return np.ascontiguousarray(full.reshape(-1, PANEL, n).transpose(0, 2, 1))


def matrix(rng: np.random.Generator, shape: tuple[int, int], kind: QT) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the tensor's bytes, the same dequantised)."""
    random = random_matrix(rng, shape, kind, shape[1] ** -0.5)
    return random.data, dequantize(random.data, kind).astype(np.float64)


def normed(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -700, 700)))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates the pairs (i, i + n/2) of the first n values; cos and sin [..., n/2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos, rest), -1)


def assert_close(got: np.ndarray, want: np.ndarray, limit: float) -> None:
    assert np.abs(got - want).max() <= limit * max(1.0, np.abs(want).max())
