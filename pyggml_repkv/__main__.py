"""`python -m pyggml_repkv`."""

import sys

if __name__ == "__main__":
    try:
        from pyggml_repkv.cli.main import main

        sys.exit(main())
    except KeyboardInterrupt:
        # Ctrl-C while the command line itself was being imported.
        sys.exit(130)
