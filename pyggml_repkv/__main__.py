"""The process of the command line: `python -m pyggml_repkv`, and the installed script."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code, also where a signal stopped it."""
    from pyggml_repkv.cli import signals

    try:
        signals.install()
        from pyggml_repkv.cli.main import main as run

        code = run()
    except KeyboardInterrupt:
        # While the command line itself was being imported.
        code = signals.exit_code()
    signals.ignore()
    return code


if __name__ == "__main__":
    sys.exit(main())
