"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783) and what is converted as such: SmolLM2, Mistral, dense Granite code."""

from pyggml_repkv.arch.base import QKV_BIASES, Arch

LLAMA = Arch(
    "llama",
    # Converters reorder the rows of q and k, whose RoPE is by halves in the published weights.
    rope="pairs",
    optional=QKV_BIASES
    | {
        "attn_output.bias",
        "ffn_gate.bias",
        "ffn_up.bias",
        "ffn_down.bias",
        # Llama 3's scaling of long contexts: what each frequency is divided by.
        "rope_freqs.weight",
    },
)
