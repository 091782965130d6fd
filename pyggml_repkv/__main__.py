"""`python -m pyggml_repkv`."""

import sys

from pyggml_repkv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
