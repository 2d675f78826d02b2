"""What the engine raises when it refuses something on purpose."""

from __future__ import annotations

from typing import Any


class EngineError(ValueError):
    """The data or the arguments cannot be used; the message is one clear sentence.

    Any other exception that leaves the engine is an error of the program.
    """


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; the blocks that were finished are in `result`, a `FitResult`.

    Voxels that were not reached are NaN and flagged 8, "not converged".
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result
