"""The one exception a user is meant to read."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used; the message is one clear sentence.

    Say which file and field, what was found, and what to do about it. It is printed as it stands,
    without a traceback.
    """
