"""Measures how far keys and values in 8 bits are from those in F16: `python tools/cache_accuracy.py FILE [MODEL]`.

Run it from the repository's root. FILE is a text, of which the first tokens are read; MODEL is a file or a name
(default: demo). Prints the mean Kullback-Leibler divergence of the next-token distribution, nats.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyggml_repkv.engine.model import Model
from pyggml_repkv.lab.eval.likelihood import divergence
from pyggml_repkv.memory.config import MemoryConfig

N_TOKENS = 256
FULL = MemoryConfig(n_ctx=512)
# Old tokens are evicted from the start, and all blocks are attended, so that selecting plays no part.
REPKV = MemoryConfig(
    kv="repkv", n_ctx=512, n_batch=64, n_dense=0, n_sink=4, n_local=64, block="fixed:32", budget=2048, chunk_budget=2048
)
KEYS: dict[str, Any] = {"type_k": "q8_0"}
CASES: tuple[tuple[str, MemoryConfig, dict[str, Any]], ...] = (
    ("full -ctk q8_0", FULL, KEYS),
    ("full -ctv q8_0", FULL, {"type_v": "q8_0"}),
    ("repkv -ctk q8_0, exact", replace(REPKV, positions="exact"), KEYS),
    ("repkv -ctk q8_0, far", replace(REPKV, positions="far"), KEYS),
    ("repkv evicted q8_0, exact", replace(REPKV, positions="exact"), {"type_evicted": "q8_0", "kv_ram": 2**26}),
)


def main(text_file: str, name: str = "demo") -> None:
    for nodes, repack in (("packed", False), ("as loaded by default", True)):
        with Model.load(name, repack=repack) as model:
            tokens = model.tokenizer.encode(Path(text_file).read_text("utf-8"))[:N_TOKENS]
            for what, memory, types in CASES:
                # repkv needs the weights as the file has them.
                if memory.kv == "repkv" and model.weights.repacked:
                    continue
                with model.session(memory) as session:
                    wanted = session.prefill_all(tokens)
                with model.session(replace(memory, **types)) as session:
                    kl = divergence(wanted, session.prefill_all(tokens)).mean()
                print(f"{what:26} {nodes:21} KL {kl:.1e}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
