"""What a user says of RoPE instead of the model file: llama.cpp's flags, with its meanings."""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyggml_repkv.errors import InputError
from pyggml_repkv.model.limits import MAX_CONTEXT, MAX_SCALING

if TYPE_CHECKING:
    from pyggml_repkv.model.config import ModelConfig

log = logging.getLogger(__name__)

ROPE_SCALINGS = ("none", "linear", "yarn")

# YaRN divides by the logarithm of the base.
MIN_BASE, MAX_BASE = 1.001, 1e12


@dataclass(frozen=True, slots=True)
class RopeOptions:
    """How RoPE is stretched; None leaves what the file says.

    scaling: none, linear or yarn; scale: by how much the context grows; freq_base: RoPE's base; orig_ctx: tokens that
    the model was trained on before YaRN (without it the file's, or its context). Raises InputError for values that no
    model can have.
    """

    scaling: str | None = None
    scale: float | None = None
    freq_base: float | None = None
    orig_ctx: int | None = None

    def __post_init__(self) -> None:
        if self.scaling is not None and self.scaling not in ROPE_SCALINGS:
            raise InputError(f"--rope-scaling is {self.scaling!r}; it must be one of {', '.join(ROPE_SCALINGS)}")
        limits = (
            ("--rope-scale", self.scale, 1 / MAX_SCALING, MAX_SCALING, (int, float)),
            ("--rope-freq-base", self.freq_base, MIN_BASE, MAX_BASE, (int, float)),
            ("--yarn-orig-ctx", self.orig_ctx, 1, MAX_CONTEXT, (int,)),
        )
        for flag, value, low, high, kinds in limits:
            sound = isinstance(value, kinds) and type(value) is not bool and low <= value <= high
            if value is not None and not sound:
                kind = "whole number" if float not in kinds else "number"
                raise InputError(f"{flag} is {value!r}; it must be a {kind} between {low:.9g} and {high:.9g}")

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """Returns the config as if its file had these values. Raises InputError for what does not go together."""
        before = config.rope_scaling
        kind = self.scaling or before.kind
        factor = before.factor if self.scale is None else _as_float32(self.scale)
        if self.scale is not None and kind == "none":
            remedy = "leave it out" if self.scaling else "add --rope-scaling yarn or linear"
            raise InputError(f"--rope-scale {self.scale:g} has nothing to scale: {remedy}")
        if self.orig_ctx is not None and kind != "yarn":
            raise InputError(f"--yarn-orig-ctx is for --rope-scaling yarn, and the scaling is {kind}")
        if kind == "yarn" and factor < 1:
            raise InputError(f"yarn scaling needs a factor of at least 1, not {factor:g}: give a larger --rope-scale")
        if self.scaling in ("linear", "yarn") and self.scale is None and factor == 1:
            log.warning("--rope-scaling %s scales nothing: the file names no factor; give --rope-scale", kind)
        if kind == "none" or (kind == "linear" and factor == 1):
            kind, factor = "none", 1.0
        scaling = replace(
            before,
            kind=kind,
            factor=factor,
            orig_context=self.orig_ctx or before.orig_context,
            ext_factor=1.0 if kind == "yarn" else 0.0,
        )
        if scaling != before and kind == "yarn" and factor * scaling.orig_context > MAX_CONTEXT:
            raise InputError(f"{scaling} would be more than {MAX_CONTEXT} tokens: give a smaller --rope-scale")
        n_ctx_train = config.n_ctx_train
        # As llama.cpp counts: only YaRN reaches further without training.
        if scaling != before and "yarn" in (kind, before.kind):
            n_ctx_train = scaling.reach if kind == "yarn" else before.orig_context
        base = config.rope_base if self.freq_base is None else _as_float32(self.freq_base)
        return replace(config, rope_base=base, rope_scaling=scaling, n_ctx_train=n_ctx_train)


AS_IN_FILE = RopeOptions()


def _as_float32(value: float) -> float:
    """What a model file would hold: a flag and the same value in the file give the same bits."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
