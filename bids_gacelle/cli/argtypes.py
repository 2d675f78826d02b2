"""Types of command-line values: text in, checked value out, a sentence when it cannot be."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any


def existing_path(text: str) -> Path:
    """A file or folder that is there, as an absolute path."""
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def any_path(text: str) -> Path:
    """A path that need not exist yet."""
    return Path(text).expanduser().absolute()


def named_path(text: str) -> tuple[str, Path]:
    """``name=path`` or a path, then named by its last part (letters and digits only)."""
    name, found, path = text.partition("=")
    if not found:
        name, path = Path(text.rstrip("/")).name.split(".")[0], text
    name = re.sub(r"[^0-9a-zA-Z]", "", name)
    if not name:
        raise argparse.ArgumentTypeError(f"'{text}': write NAME=PATH, NAME of letters and digits")
    return name, existing_path(path)


def named_uri(text: str) -> tuple[str, str]:
    """``name=uri``."""
    name, found, uri = text.partition("=")
    if not (found and name and uri):
        raise argparse.ArgumentTypeError(f"'{text}': write NAME=URI")
    return name, uri


def label(prefix: str) -> Any:
    """Labels without their ``sub-`` or ``ses-``; a readable file gives one label per line."""

    def labels(text: str) -> list[str]:
        path = Path(text)
        texts = path.read_text().split() if path.is_file() else [text]
        return [t.removeprefix(prefix) for t in texts]

    labels.__name__ = f"{prefix}label"
    return labels


def milliseconds(text: str) -> float:
    """A time with its unit, ``6ms`` or ``0.006s``, in ms; a bare number is refused."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(ms|s)\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}': write a time with its unit, 6ms or 0.006s")
    value = float(match[1]) * (1.0 if match[2] == "ms" else 1000.0)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1000 ms")
    return value


def tesla(text: str) -> float:
    """A field strength such as ``3`` or ``3T``, in T."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*T?\s*", text, flags=re.IGNORECASE)
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if not 0.02 <= value <= 20:
        raise argparse.ArgumentTypeError(f"'{text}': write a field strength in T, such as 3")
    return value


def degrees(text: str) -> float:
    """An increment of the RF phase, such as ``50`` or ``117deg``, in degrees."""
    try:
        value = float(text.strip().lower().removesuffix("deg"))
    except ValueError:
        value = math.nan
    if not 4 <= value < 360:
        raise argparse.ArgumentTypeError(f"'{text}': write an angle from 4 to 360 degrees")
    return value


def voxel_map(text: str) -> tuple[str, str]:
    """``input=path``; the path may hold {subject} and {session}, else it must be there."""
    name, found, path = text.partition("=")
    if not (found and path and re.fullmatch(r"[A-Za-z]\w*", name)):
        raise argparse.ArgumentTypeError(f"'{text}': write INPUT=PATH, e.g. theta=theta.nii.gz")
    if "{" in path:
        return name, str(any_path(path))
    return name, str(existing_path(path))


def gigabytes(text: str) -> float:
    """Memory such as ``8``, ``8G`` or ``8000M``, in GB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([GM]?)B?\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}': write memory as 8G or 8000M")
    return float(match[1]) / (1000.0 if match[2].upper() == "M" else 1.0)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def model_option(text: str) -> tuple[str, str, Any]:
    """``model.option=value``; a value that looks like a number or true/false becomes one."""
    match = re.fullmatch(r"([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)=(.+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}': write MODEL.OPTION=VALUE, e.g. nexi.l_max=2")
    return match[1], match[2], _literal(match[3])


def comma_list(text: str) -> list[str]:
    """Words separated by commas."""
    return [word for word in re.split(r"[,\s]+", text.strip()) if word]


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for cast in (int, float):
        try:
            return cast(text)
        except ValueError:
            continue
    return text
