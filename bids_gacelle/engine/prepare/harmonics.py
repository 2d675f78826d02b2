"""Real spherical harmonics of even degree, and fits of them to the signals of one shell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

_LAPLACE_BELTRAMI = 0.006  # Descoteaux et al. 2007, doi:10.1002/mrm.21277


def real_sh(directions: npt.ArrayLike, order: int) -> _Float:
    """Real orthonormal spherical harmonics of even degree.

    Descoteaux et al. 2007, eq. 3: columns l = 0, 2, ... ``order``, within l m = -l ... l;
    sqrt(2) Re Y_lm for m < 0, Y_l0, sqrt(2) Im Y_lm for m > 0 (Condon-Shortley phase).

    Parameters
    ----------
    directions : (n, 3) unit vectors.
    order : highest (even) degree.

    Returns
    -------
    (n, (order + 1) (order + 2) / 2)
    """
    x, y, z = np.asarray(directions, dtype=np.float64).T
    phi, sine = np.arctan2(y, x), np.hypot(x, y)
    legendre: dict[tuple[int, int], _Float] = {(0, 0): np.full_like(z, np.sqrt(1 / (4 * np.pi)))}
    for m in range(order + 1):
        if m:
            legendre[m, m] = -np.sqrt((2 * m + 1) / (2 * m)) * sine * legendre[m - 1, m - 1]
        for degree in range(m + 1, order + 1):
            below = legendre.get((degree - 2, m), np.zeros_like(z))
            step = np.sqrt(((degree - 1) ** 2 - m**2) / (4 * (degree - 1) ** 2 - 1))
            scale = np.sqrt((4 * degree**2 - 1) / (degree**2 - m**2))
            legendre[degree, m] = scale * (z * legendre[degree - 1, m] - step * below)
    columns = []
    for degree in range(0, order + 1, 2):
        for m in range(-degree, degree + 1):
            # Re Y_l,-m = (-1)^m Re Y_lm
            angle = (-1) ** m * np.cos(m * phi) if m < 0 else np.sin(m * phi)
            angular = np.sqrt(2) * angle if m else 1.0
            columns.append(angular * legendre[degree, abs(m)])
    return np.stack(columns, axis=1)


def sh_fit_matrix(
    directions: npt.ArrayLike, order: int, penalty_above: int | None = None
) -> _Float:
    """Matrix that turns the signals of one shell into even real SH coefficients.

    Least squares, with the Laplace-Beltrami penalty of Descoteaux et al. 2007 on the degrees
    above ``penalty_above`` only (None: no penalty). Antipodes need not be added: the even basis
    has them.

    Returns
    -------
    ((order + 1) (order + 2) / 2, n)
    """
    basis = real_sh(directions, order)
    if penalty_above is None:
        return np.linalg.pinv(basis)
    degree = degrees(order)
    penalty = np.where(degree > penalty_above, (degree * (degree + 1.0)) ** 2, 0.0)
    normal = basis.T @ basis + _LAPLACE_BELTRAMI * np.diag(penalty)
    return np.linalg.solve(normal, basis.T)


def degrees(order: int) -> _Index:
    """Degree l of each column of ``real_sh``."""
    return np.concatenate([np.full(2 * degree + 1, degree) for degree in range(0, order + 1, 2)])
