"""Convert SmolLM2 to a qwen2 model: from a given file, or by default the cached demo model."""

import argparse
import sys
from pathlib import Path

from pyggml_repkv.errors import RepkvError
from pyggml_repkv.model.demo import convert_smollm2
from pyggml_repkv.model.names import find_model


def main(argv: list[str] | None = None) -> int:
    """Converts, prints the path of the result, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", metavar="FILE", type=Path, help="SmolLM2 in GGUF format")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write the qwen2 model")
    args = parser.parse_args(argv)
    if (args.source is None) != (args.out is None):
        parser.error("give both --from and --out, or neither for the cached demo model")
    try:
        if args.source is None:
            print(find_model("demo"))
        else:
            convert_smollm2(args.source, args.out)
            print(args.out)
    except RepkvError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
