"""A loaded model: file, tokenizer, weights and threads. Sessions hold what changes."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyggml_repkv.arguments import check_bool, check_int, check_path, check_type
from pyggml_repkv.engine.session import Session
from pyggml_repkv.engine.session_store import ROPE_OF_FILE, SessionStore, kept_settings
from pyggml_repkv.engine.threads import MAX_THREADS, default_threads
from pyggml_repkv.errors import InputError, ModelFileError
from pyggml_repkv.ffi.handles import Backend, return_free_memory
from pyggml_repkv.graph.plan import GraphModel
from pyggml_repkv.memory.centres import centres_keys
from pyggml_repkv.memory.config import MemoryConfig
from pyggml_repkv.memory.cut.boundaries import BoundaryScores
from pyggml_repkv.memory.policy import Policy
from pyggml_repkv.memory.registry import POLICIES, policy_identity, policy_kind
from pyggml_repkv.model.config import ModelConfig
from pyggml_repkv.model.first_keys import FirstLayerKeys
from pyggml_repkv.model.gguf_file import GGUFFile
from pyggml_repkv.model.names import find_model
from pyggml_repkv.model.rope_options import AS_IN_FILE, RopeOptions
from pyggml_repkv.model.tensors import check_tensors
from pyggml_repkv.model.tokenizer import Tokenizer
from pyggml_repkv.model.weights import Weights

if TYPE_CHECKING:
    from pyggml_repkv.model.chat_prompt import ChatPrompt
    from pyggml_repkv.model.chat_template import ChatTemplate


class Model:
    """Read-only after loading. Its sessions share one set of threads and take turns, step by step."""

    def __init__(
        self, file: GGUFFile, config: ModelConfig, weights: Weights, backend: Backend, *, exact: bool, normalize: bool,
        rope: str = ROPE_OF_FILE,
    ) -> None:  # fmt: skip
        """rope: how RoPE is scaled where that is not the file's way: kept keys are of use for the same only."""
        self.file, self.config, self.weights, self.backend, self.rope = file, config, weights, backend, rope
        self.graph = GraphModel(config, weights, backend, exact=exact)
        self.load_ms = 0.0
        self._normalize = normalize
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        repack: bool = True,
        exact_graph: bool = False,
        normalize: bool | None = None,
        rope: RopeOptions = AS_IN_FILE,
    ) -> Model:
        """Opens a GGUF file of one of the families in `ARCHS`; of a split model, the first part.

        path: a file, a name that `model list` shows, or "hf:USER/REPO[:QUANT]"; the last two are fetched once
        (`model.names.find_model` says which is which, and shows progress).
        threads: None = the physical cores this process may use, or less where a control group has a CPU quota.
        repack: copy matrices into faster layouts where this CPU has them.
        exact_graph: llama.cpp's nodes one by one, for logits equal to its bit for bit; slower in decode.
        normalize: bring text to NFC where the model's own tokenizer does; None: unless exact_graph, as llama.cpp.
        rope: RoPE's scaling and base where they are not to be the file's.
        Raises ModelFileError (a bad file), InputError (a bad argument), ComputeError (no memory).
        """
        start = time.perf_counter()
        check_path("the model's path", path)
        for name, flag in (("repack", repack), ("exact_graph", exact_graph)):
            check_bool(name, flag)
        check_type("normalize", normalize, (bool, type(None)), "True, False or None")
        n_threads = default_threads() if threads is None else check_int("threads", threads)
        if not 1 <= n_threads <= MAX_THREADS:
            raise InputError(f"-t is {n_threads}; it must be between 1 and {MAX_THREADS}")
        check_type("rope", rope, RopeOptions, "a RopeOptions")
        file = GGUFFile.open(find_model(path))
        own = ModelConfig.from_gguf(file)
        config = rope.applied_to(own)
        check_tensors(file, config)
        weights = Weights(file, config, repack=repack, join=not exact_graph)
        rope_is = ROPE_OF_FILE if config == own else f"{config.rope_scaling}, base {config.rope_base:.9g}"
        normalize = not exact_graph if normalize is None else normalize
        model = cls(file, config, weights, Backend(n_threads), exact=exact_graph, normalize=normalize, rope=rope_is)
        # The tokenizer is part of loading: a broken vocabulary should be known before a prompt is typed.
        try:
            _ = model.tokenizer
        except ModelFileError as error:
            model.close()
            raise ModelFileError(f"{path}: {error}") from None
        # Half of what was parsed; nobody needs it again.
        file.metadata.pop("tokenizer.ggml.merges", None)
        return_free_memory()
        model.load_ms = (time.perf_counter() - start) * 1e3
        return model

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that stay in memory: the mapped file, and repacked copies instead of what they replace."""
        return self.file.n_bytes - self.weights.replaced_bytes + self.weights.repacked_bytes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_metadata(self.file.metadata)
        tokenizer.normalizes &= self._normalize
        return tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The file's own, or None; only now is Jinja2 imported."""
        from pyggml_repkv.model.chat_template import ChatTemplate

        return ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> ChatPrompt:
        """The text and the token ids of a conversation in the model's chat template, for `Session.generate`.

        What messages say is text, whatever they spell out. options: those of `ChatTemplate.render`. Raises InputError
        where the model has no template, and for messages that it cannot render.
        """
        from pyggml_repkv.model.chat_prompt import chat_prompt

        if self.chat_template is None:
            raise InputError("this model has no chat template; leave --chat out, or use an instruct model")
        return chat_prompt(self.chat_template, self.tokenizer, messages, **options)

    def session(
        self, memory: MemoryConfig | None = None, *, directory: str | os.PathLike[str] | None = None
    ) -> Session:
        """A new, empty context. Raises InputError for an unknown policy, ComputeError when memory is short.

        directory: where it is kept as it goes (`repkv` only); what is kept there already is taken up by `go_back_to`,
        or by `resume`.
        """
        if self.backend.closed:
            raise InputError("the model is closed")
        check_type("memory", memory, (MemoryConfig, type(None)), "a MemoryConfig")
        if directory is not None:
            check_path("directory", directory)
        memory = memory or MemoryConfig()
        if directory is not None and memory.kv_dir:
            raise InputError("--session keeps evicted blocks in its own directory: leave out --kv-dir")
        store = None if directory is None else self._open_store(Path(directory), memory)

        def make() -> Policy:
            inputs = self.graph.policy_inputs(memory, self._boundaries)
            if store is None:
                return self.graph.make_policy(inputs)
            long = bool(store.meta("settings").get("far from the start"))
            blocks = store.open_blocks()
            try:
                return self.graph.make_policy(replace(inputs, kept=True, block_file=blocks, long=long))
            except BaseException:
                blocks.close()
                raise

        try:
            session = Session(
                self.graph, self.backend, self.tokenizer, memory, self.weight_bytes, make_policy=make, store=store,
                open_store=lambda folder, kept: self._open_store(folder, memory, long=kept.long),
                on_fork=self._sessions.add,
            )  # fmt: skip
        except BaseException:
            if store is not None:
                store.close()
            raise
        self._sessions.add(session)
        return session

    def resume(self, directory: str | os.PathLike[str], memory: MemoryConfig | None = None) -> Session:
        """The session that is kept in a directory, as of its newest save.

        memory: settings that must be those it was made with, and where blocks go now; None: as it was made, without a
        limit on RAM; not for a memory that a file of the user's makes, since what a directory names is not run. Raises
        as `session` does; InputError where there is none.
        """
        check_path("directory", directory)
        if not (Path(directory) / "session.db").is_file():
            raise InputError(f"{directory}: there is no session")
        kept = kept_settings(Path(directory))
        if memory is None and kept.kv not in POLICIES:
            raise InputError(f"{directory}: it was made with --kv {kept.kv}: give that memory to take it up")
        session = self.session(memory or kept, directory=directory)
        try:
            session.go_back_to(None, lambda _: False)
        except BaseException:
            session.close()
            raise
        return session

    def _open_store(self, folder: Path, memory: MemoryConfig, *, long: bool | None = None) -> SessionStore:
        """long: far from the start; None: as the length says."""
        if not policy_kind(memory.kv).evicts:
            raise InputError(f"--session keeps what a memory evicts, as --kv repkv does; --kv is {memory.kv}")
        if long is None:
            long = memory.positions == "auto" and memory.n_ctx > self.config.n_ctx_train
        settings = memory.identity(long=long) | {"--kv": policy_identity(memory.kv), "RoPE": self.rope}
        if centres_keys(memory, self.graph.key_biases):
            settings["stored keys"] = "less their bias"
        return SessionStore(folder, {"model": self.fingerprint, "settings": settings})

    @cached_property
    def fingerprint(self) -> str:
        """Of each part of the file: its size, its header and the beginning of every tensor. Reading all would take a
        second a GB.
        """
        digest = hashlib.blake2b(digest_size=16)
        for number, data in enumerate(self.file.parts):
            offsets = sorted(info.offset for info in self.file.tensors.values() if info.part == number)
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(bytes(data[: offsets[0]] if offsets else data))
            for offset in offsets:
                digest.update(bytes(data[offset : offset + 4096]))
        return digest.hexdigest()

    def _boundaries(self) -> BoundaryScores:
        return BoundaryScores(self.tokenizer.token_bytes, FirstLayerKeys(self.file, self.config))

    def close(self) -> None:
        for session in list(self._sessions):
            session.close()
        self.weights.close()
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
