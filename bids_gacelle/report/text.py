"""How the report writes numbers and units."""

from __future__ import annotations

import math
import re
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WORDS = {"1": "", "arbitrary": "a.u.", "deg": "°", "percent": "%"}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# Code points that no HTML page may contain: controls, lone surrogates, non-characters.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF))
    + "]"
)


def clean(value: Any) -> Any:
    """Strip terminal colours and code points that HTML forbids; leave anything but text alone."""
    if not isinstance(value, str):
        return value
    plain = _ANSI.sub("", value).replace("\r\n", "\n").replace("\r", "\n")
    return type(value)(_FORBIDDEN.sub("\ufffd", plain))


def unit(cmixf: str) -> str:
    """Spell a CMIXF unit as people read it: ``um^2/ms`` -> ``µm²/ms``; ``1`` -> nothing."""
    if cmixf in _WORDS:
        return _WORDS[cmixf]
    readable = re.sub(r"\bu(?=(m|s|g|T|mol)\b)", "µ", cmixf)
    return re.sub(r"\^(-?\d+)", lambda power: power[1].translate(_SUPERSCRIPT), readable)


def axis_label(label: str) -> str:
    """Make the unit in brackets at the end of an axis label readable."""
    return re.sub(r"\(([^()]+)\)$", lambda brackets: f"({unit(brackets[1])})", label)


def with_unit(label: str, cmixf: str) -> str:
    """Write ``label (unit)``, or the label alone for a quantity without a unit."""
    return f"{label} ({unit(cmixf)})" if unit(cmixf) else label


def finite(value: Any) -> float | None:
    """Return the value as a float, or None when it is no finite number."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def number(value: Any, digits: int = 4) -> str:
    """Write a number with ``digits`` significant digits; ``n/a`` when it is none."""
    result = finite(value)
    if result is None:
        return "n/a"
    if result == 0:
        return "0"
    exponent = math.floor(math.log10(abs(result)))
    if -4 <= exponent < 7:
        text = f"{result:.{max(digits - 1 - exponent, 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{result:.{digits - 1}e}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if result < 0 else text


def interval(ends: Any, cmixf: str) -> str:
    """Write ``low to high unit``; an end that is None or infinite is open."""
    low, high = (finite(end) for end in ends or (None, None))
    words = {
        (True, True): f"{number(low)} to {number(high)}",
        (True, False): f"at least {number(low)}",
        (False, True): f"at most {number(high)}",
        (False, False): "none",
    }
    shown = words[low is not None, high is not None]
    return f"{shown} {unit(cmixf)}".strip() if shown != "none" else shown


def count(value: Any) -> str:
    """Write an integer with thin spaces between thousands."""
    result = finite(value)
    return (
        "n/a" if result is None else f"{round(result):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    )


def percent(value: Any) -> str:
    """Write a fraction as a percentage, almost none and all as ``< 0.1 %``, ``> 99.9 %``."""
    result = finite(value)
    if result is None:
        return "n/a"
    if 0 < result < 1e-3:
        return "< 0.1\N{NARROW NO-BREAK SPACE}%"
    if result in (0, 1):
        return f"{100 * result:.0f}\N{NARROW NO-BREAK SPACE}%"
    if 0.9995 <= result < 1:
        return "> 99.9\N{NARROW NO-BREAK SPACE}%"
    return f"{100 * result:.1f}\N{NARROW NO-BREAK SPACE}%"


def seconds(value: Any) -> str:
    """Write a duration: ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    total = finite(value)
    if total is None:
        return "n/a"
    if total < 100:
        return f"{number(total, 2 if total < 10 else 3)} s"
    minutes, rest = divmod(round(total), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def estimate(value: Any, deviation: Any) -> str:
    """Write ``value ± SD``, both rounded to the second significant digit of the SD."""
    centre, spread = finite(value), finite(deviation)
    if centre is None:
        return "n/a"
    if not spread or spread <= 0:
        return f"{number(centre)} (no SD)"
    decimals = max(1 - math.floor(math.log10(spread)), 0)
    sign = "\N{MINUS SIGN}" if centre < 0 else ""
    return f"{sign}{abs(centre):.{decimals}f} ± {spread:.{decimals}f}"


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which ``ses-2`` comes before ``ses-10``."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
