"""What the engine raises when it refuses something on purpose."""

from __future__ import annotations


class EngineError(ValueError):
    """The data or the arguments cannot be used; the message is one clear sentence.

    Any other exception that leaves the engine is an error of the program.
    """
