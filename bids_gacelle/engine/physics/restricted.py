"""Diffusion between two gradient pulses, restricted in a cylinder or a sphere.

In the Gaussian phase approximation the signal is exp(-C) with C = g^2 h(r), g being the gradient
times the gyromagnetic ratio in rad/(um ms). The sum h depends on the gradient's timing and on the
radius alone, so a fit reads it, and its slope, from one table for each pair of pulse times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]

ROOTS = 100
KNOTS = 2048


@dataclass(frozen=True)
class Geometry:
    """A pore across which, or in which, diffusion is restricted.

    Attributes
    ----------
    roots
        Function that returns the roots b_m of the pore's eigenvalue equation.
    shift
        p in the series 1 / (B_m^2 (B_m - p)), with B_m = b_m^2.
    wide
        Limit of h D0 / (delta r^4) for a pore that is small for the time delta.
    """

    roots: Callable[[], FloatArray]
    shift: int
    wide: float


@cache
def cylinder_roots() -> FloatArray:
    """Return the first positive roots of J1'(x), the derivative of the Bessel function."""
    # J1(x) is the mean of cos(t - x sin t) over a period, exact for as many points as these.
    angle = np.linspace(0, 2 * np.pi, 1024, endpoint=False)
    sine = np.sin(angle)
    x = np.pi * (np.arange(1, ROOTS + 1, dtype=np.float64) - 0.25)
    x -= 7 / (8 * x)  # McMahon's expansion
    for _ in range(8):
        phase = angle - x[:, None] * sine
        first = (sine * np.sin(phase)).mean(1)
        second = -(sine**2 * np.cos(phase)).mean(1)
        x = x - first / second
    return x


@cache
def sphere_roots() -> FloatArray:
    """Return the first positive roots of (x^2 - 2) sin x + 2 x cos x."""
    x = np.pi * np.arange(1, ROOTS + 1, dtype=np.float64)
    x -= 2 / x
    for _ in range(8):
        x = x - ((x**2 - 2) * np.sin(x) + 2 * x * np.cos(x)) / (x**2 * np.cos(x))
    return x


CYLINDER = Geometry(cylinder_roots, 1, 7 / 48)
"""Across a cylinder: van Gelderen et al., J. Magn. Reson. B 103, 255 (1994); the wide-pulse limit
is that of Neuman, J. Chem. Phys. 60, 4508 (1974)."""

SPHERE = Geometry(sphere_roots, 2, 16 / 175)
"""In a sphere: Murday and Cotts, J. Chem. Phys. 48, 4938 (1968)."""


def scaled_attenuation(
    radius: FloatArray,
    geometry: Geometry,
    diffusivity: float,
    small_delta: float,
    big_delta: float,
) -> tuple[FloatArray, FloatArray]:
    """Return q = h / r^4 and its derivative by the radius, by the series.

    With B_m = b_m^2, l = B_m D0 / r^2, w = 1 - exp(-l delta) and u = exp(-l (Delta - delta)), the
    series h = D0 sum_m 2 / (l^3 (B_m - p)) [2 (l delta - w) - u w^2] is written as its wide-pulse
    limit, which is known, less the rest, so that r -> 0 needs no care and the tail is short.

    Parameters
    ----------
    radius
        (n,) in um, >= 0.
    geometry
        `CYLINDER` or `SPHERE`.
    diffusivity
        D0 in um^2/ms.
    small_delta, big_delta
        Duration and separation of the pulses in ms.

    Returns
    -------
    q
        (n,) in ms^2/um^2, so that C = g^2 r^4 q.
    slope
        (n,) derivative of q by the radius.
    """
    squares = geometry.roots() ** 2
    factor = 1 / (squares**3 * (squares - geometry.shift))
    r = radius[:, None]
    rate = squares * diffusivity / np.maximum(r**2, 1e-100)
    during, between = rate * small_delta, rate * (big_delta - small_delta)
    w, u = -np.expm1(-during), np.exp(-between)
    rest = 2 * w + u * w**2
    rest_by_log_rate = during * (1 - w) * 2 * (1 + u * w) - between * u * w**2
    limit = geometry.wide * small_delta / diffusivity
    q = limit - 2 * radius**2 / diffusivity**2 * (factor * rest).sum(1)
    slope = 4 * radius / diffusivity**2 * (factor * (rest_by_log_rate - rest)).sum(1)
    return q, slope


class RestrictedTable:
    """Attenuation exponents C = g^2 h(r) of all shells, by cubic Hermite interpolation.

    Parameters
    ----------
    geometry
        `CYLINDER` or `SPHERE`.
    diffusivity
        D0 in um^2/ms.
    b, small_delta, big_delta
        (shells,) in ms/um^2 and ms.
    largest_radius
        In um; the table runs from 0 to it.
    wide
        Take the limit of pulses that are long for the pore instead, C = wide g^2 delta r^4 / D0.

    Notes
    -----
    What is tabulated is h / r^4, which has no singularity and hardly varies where r is small.
    """

    def __init__(
        self,
        geometry: Geometry,
        diffusivity: float,
        b: FloatArray,
        small_delta: FloatArray,
        big_delta: FloatArray,
        largest_radius: float,
        *,
        wide: bool = False,
    ) -> None:
        # b = g^2 delta^2 (Delta - delta / 3)
        self.gradient2 = b / (small_delta**2 * (big_delta - small_delta / 3))
        pairs, which = np.unique(
            np.stack([small_delta, big_delta], 1), axis=0, return_inverse=True
        )
        step = largest_radius / (KNOTS - 1)
        knots = step * np.arange(KNOTS, dtype=np.float64)
        cells = []
        for small, big in pairs:
            if wide:
                q, slope = np.full(KNOTS, geometry.wide * small / diffusivity), np.zeros(KNOTS)
            else:
                q, slope = scaled_attenuation(knots, geometry, diffusivity, small, big)
            cells.append(_hermite(q, step * slope))
        self._per_um = 1 / step
        self._cells = np.stack(cells)
        self._pair = which.reshape(-1)
        self._constants: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def __call__(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return C and its derivative by the radius.

        Parameters
        ----------
        radius
            (...) in um.

        Returns
        -------
        exponent, slope
            (shells, ...) each.
        """
        cells, pair, gradient2 = self._on(radius)
        place = radius * self._per_um
        cell = place.long().clamp(0, KNOTS - 2)
        t = place - cell
        c0, c1, c2, c3 = cells[..., cell].unbind(1)  # (pairs, ...) each
        q = c0 + t * (c1 + t * (c2 + t * c3))
        slope = (c1 + t * (2 * c2 + t * (3 * c3))) * self._per_um
        cube = radius**3
        h, h_slope = cube * radius * q, cube * (4 * q + radius * slope)
        g2 = gradient2.reshape(-1, *(1,) * radius.ndim)
        return g2 * h[pair], g2 * h_slope[pair]

    def _on(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the constants in the precision and on the device of `like`."""
        key = (like.dtype, like.device)
        if key not in self._constants:
            self._constants[key] = (
                torch.tensor(self._cells, dtype=like.dtype, device=like.device),
                torch.tensor(self._pair, device=like.device),
                torch.tensor(self.gradient2, dtype=like.dtype, device=like.device),
            )
        return self._constants[key]


def _hermite(value: FloatArray, slope: FloatArray) -> FloatArray:
    """Return the (4, cells) coefficients, lowest first, of cubics in t of 0 to 1 in each cell."""
    rise = np.diff(value)
    first, last = slope[:-1], slope[1:]
    return np.stack([value[:-1], first, 3 * rise - 2 * first - last, first + last - 2 * rise])
