"""The errors a user can cause or meet. Each message is one line: what, where, and what would be right."""


class RepkvError(Exception):
    """Base of every error this package raises on purpose; the command line turns it into one line."""

    exit_code = 1


class InputError(RepkvError):
    """A bad flag, argument or file: the caller can fix it and try again."""

    exit_code = 2


class ModelFileError(InputError):
    """A GGUF file that is damaged, unsupported or not what its metadata claims."""


class ContextFullError(RepkvError):
    """The tokens do not fit in the context that was asked for."""


class ComputeError(RepkvError):
    """ggml could not allocate or compute a graph."""


class StoreError(RepkvError):
    """Evicted blocks could not be written, or what was read of them is not what was written.

    lost: whether what is stored is no longer right, so that only reading the tokens again helps.
    """

    def __init__(self, message: str, *, lost: bool = True) -> None:
        super().__init__(message)
        self.lost = lost
