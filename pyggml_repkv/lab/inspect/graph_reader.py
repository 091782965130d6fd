"""A ggml graph as plain values: its nodes in order, and its leaves, which nodes read and no node makes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyggml_repkv.ffi.context import GraphContext, Tensor
from pyggml_repkv.ffi.library import g, native_ffi
from pyggml_repkv.ops.table import OPS, TRACED_OP, OpInfo


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor of a graph. shape: in numpy order, without leading ones; sources: addresses; view_of: address of the
    tensor whose memory it shares, or 0; buffer: a number for its memory; offset: its place there, or -1 before
    allocation.
    """

    address: int
    name: str
    op: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    sources: tuple[int, ...]
    view_of: int
    buffer: int
    offset: int
    is_input: bool
    is_output: bool


@dataclass(frozen=True, slots=True)
class RawGraph:
    """A graph. leaves: by address, in the order in which nodes first read them."""

    nodes: tuple[RawTensor, ...]
    leaves: dict[int, RawTensor]


def read_graph(context: GraphContext) -> RawGraph:
    """Returns the graph as it is now. Only after allocation does it say where tensors lie."""
    graph = context.graph
    pointers = [g.ggml_graph_node(graph, i) for i in range(g.ggml_graph_n_nodes(graph))]
    nodes = tuple(_read(pointer) for pointer in pointers)
    made = {node.address for node in nodes}
    leaves: dict[int, RawTensor] = {}
    for pointer in pointers:
        for source in _reached(pointer):
            address = address_of(source)
            if address not in made and address not in leaves:
                leaves[address] = _read(source)
    return RawGraph(nodes, leaves)


def graph_inputs(context: GraphContext) -> list[Tensor]:
    """Returns the inputs that nodes read: they must be filled before each compute."""
    graph, found = context.graph, {}
    for i in range(g.ggml_graph_n_nodes(graph)):
        for source in _reached(g.ggml_graph_node(graph, i)):
            if source.contents.flags & g.GGML_TENSOR_FLAG_INPUT:
                found[address_of(source)] = source
    return list(found.values())


def _reached(pointer: Tensor) -> Iterator[Tensor]:
    """Yields the sources of a node, and the tensors that they and the node are views of."""
    for source in _sources(pointer):
        yield source
        if source.contents.view_src:
            yield source.contents.view_src
    if pointer.contents.view_src:
        yield pointer.contents.view_src


def _sources(pointer: Tensor) -> list[Tensor]:
    return [source for source in pointer.contents.src if source]


def address_of(pointer: Tensor) -> int:
    """Returns the address that identifies a tensor in a RawGraph."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _read(pointer: Tensor) -> RawTensor:
    t = pointer.contents
    shape = [int(n) for n in reversed(t.ne)]
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return RawTensor(
        address=address_of(pointer),
        name=t.name.decode("utf-8", errors="replace"),
        op=_op(t),
        type=g.ggml_type_name(t.type).decode(),
        shape=tuple(shape),
        n_bytes=int(g.ggml_nbytes(pointer)),
        sources=tuple(address_of(source) for source in _sources(pointer)),
        view_of=address_of(t.view_src) if t.view_src else 0,
        buffer=int(t.buffer or 0),
        offset=_offset(t),
        is_input=bool(t.flags & g.GGML_TENSOR_FLAG_INPUT),
        is_output=bool(t.flags & g.GGML_TENSOR_FLAG_OUTPUT),
    )


def _offset(t: Any) -> int:
    if not t.buffer or not t.data:
        return -1
    return int(t.data - (g.ggml_backend_buffer_get_base(t.buffer) or 0))


def noting_nodes(context: GraphContext) -> list[Any]:
    """Returns for each node its struct repkv_op_params, which holds the times of its last compute (begin_ns, end_ns);
    None for ggml's nodes, and for those that note nothing.
    """
    nodes = (g.ggml_graph_node(context.graph, i).contents for i in range(g.ggml_graph_n_nodes(context.graph)))
    return [_op_params(t) if t.op == g.GGML_OP_CUSTOM and _pointer(t, 0) == TRACED_OP else None for t in nodes]


def _pointer(t: Any, at: int) -> int:
    """Returns a pointer of struct ggml_custom_op_params: at 0 the function, at 4 userdata (in ints)."""
    low, high = (n & 0xFFFFFFFF for n in t.op_params[at : at + 2])
    return low | high << 32


def _op_params(t: Any) -> Any:
    return native_ffi.cast("struct repkv_op_params *", _pointer(t, 4))


def _op(t: Any) -> str:
    """Returns ggml's name of the op in lower case, `repkv.` and the name of a native op, or "" for a leaf."""
    if t.op == g.GGML_OP_NONE:
        return ""
    if t.op == g.GGML_OP_CUSTOM:
        function = _pointer(t, 0)
        if function == TRACED_OP:
            function = int(native_ffi.cast("uintptr_t", _op_params(t).traced))
        return _OURS.get(function, "custom")
    return str(g.ggml_op_name(t.op).decode().lower())


_PREFIX = "repkv."
_OURS = {info.address: _PREFIX + name for name, info in OPS.items()}
_OF_GGML = OpInfo("")


def info_of(op: str) -> OpInfo:
    """Returns the OpInfo of a RawTensor's op; an empty one for ggml's ops."""
    return OPS[op.removeprefix(_PREFIX)] if op.startswith(_PREFIX) else _OF_GGML
