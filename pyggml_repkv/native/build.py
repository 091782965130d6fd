"""Compiles the C sources of this folder to `pyggml_repkv.native._native` (cffi, API mode).

setup.py calls `ffibuilder`; after a change of the C, `python pyggml_repkv/native/build.py` rebuilds in place. The
extension does not link to ggml: it gets ggml's functions as pointers at run time, so the build needs only headers.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from cffi import FFI

MODULE = "pyggml_repkv.native._native"
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]

# The CPU to compile for: this one, or the one that the variable names (vendor/ggml/README.md).
MARCH = os.environ.get("REPKV_MARCH") or "native"

COMPILE_FLAGS = [
    "-std=c11",
    "-O3",
    f"-march={MARCH}",
    "-Wall",
    "-Wextra",
    # No 64-byte vector crosses a call that is not inlined, so its calling convention on AVX2 does not matter.
    "-Wno-psabi",
    # Not -ffast-math: it lets the compiler drop the -inf of masked keys. These two change only rounding.
    "-fno-math-errno",
    "-ffp-contract=fast",
]
LINK_FLAGS = ["-lm", "-lpthread"]

# tools/sanitize.py sets the argument of -fsanitize. The first error ends the process.
if SANITIZERS := os.environ.get("REPKV_SANITIZE"):
    COMPILE_FLAGS += [
        "-O1",
        "-g",
        "-DREPKV_DEBUG",
        f"-fsanitize={SANITIZERS}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]
    LINK_FLAGS.append(f"-fsanitize={SANITIZERS}")

# The C that cffi generates has an unused `self` in every wrapper; the other files do not get this pragma.
GENERATED_PREAMBLE = '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'


def c_sources() -> list[Path]:
    """Returns the C files of this folder, without the generated `_native.c`."""
    return sorted(path for path in FOLDER.glob("*.c") if path.name != "_native.c")


def own_headers() -> list[Path]:
    return sorted(path for path in FOLDER.glob("*.h") if path.name != "cdef.h")


def ggml_include_dir() -> Path:
    """Returns the folder of ggml's headers: of the wheel that the build backend unpacked, else of the installed one."""
    given = os.environ.get("GGML_INCLUDE_DIR")
    return Path(given) if given else Path(sysconfig.get_path("platlib"), "ggml", "include")


def ffibuilder() -> FFI:
    """Returns the extension module, to be compiled from the repository root."""
    ffi = FFI()
    ffi.cdef((FOLDER / "cdef.h").read_text(encoding="utf-8"))
    includes = "".join(f'#include "{header.name}"\n' for header in own_headers())
    ffi.set_source(
        MODULE,
        GENERATED_PREAMBLE + includes,
        sources=[str(path.relative_to(ROOT)) for path in c_sources()],
        depends=[str(path.relative_to(ROOT)) for path in (*FOLDER.glob("*.h"), FOLDER / "ops.def")],
        include_dirs=[str(FOLDER), str(ggml_include_dir())],
        # -std=c11 alone hides pread, posix_memalign and O_DIRECT.
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=LINK_FLAGS,
        # Both ways of building give one file name: Python might import an old module of another name.
        py_limited_api=False,
    )
    return ffi


if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder().compile(tmpdir=str(ROOT), verbose=True)
