"""Steady states of spoiled gradient echoes."""

from __future__ import annotations

import torch
from torch import Tensor


def spgr(flip_angle: Tensor, repetition_time: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    """Spoiled gradient-echo (Ernst) signal of unit magnetisation and its derivative by R1.

    Parameters
    ----------
    flip_angle
        Actual flip angle in radian.
    repetition_time
        In s.
    r1
        Longitudinal relaxation rate in 1/s.

    Returns
    -------
    signal, slope
        sin a (1 - E) / (1 - E cos a) with E = exp(-TR R1), and its derivative by R1 in s.

    References
    ----------
    Ernst and Anderson, Rev. Sci. Instrum. 37, 93 (1966).
    """
    sin = torch.sin(flip_angle)
    versine = 2 * torch.sin(0.5 * flip_angle) ** 2  # 1 - cos a without cancellation
    recovered = -torch.expm1(-repetition_time * r1)
    e = 1 - recovered
    denominator = recovered + e * versine
    slope = sin * versine * repetition_time * e / denominator**2
    return sin * recovered / denominator, slope


def rational_fit(signal: Tensor, flip_angle: Tensor, repetition_time: Tensor) -> Tensor:
    """Return R1 of spoiled gradient echoes with any flip angles and repetition times.

    With h = tan(a / 2) and rho = 2 tanh(TR R1 / 2), the Ernst equation is S h = rho (M0 - S / 2h).
    As rho is TR R1 but for (TR R1)^3 / 12, this is a straight line,

        S h / TR = R1 M0 - R1 S / 2h,

    fitted here with the weights that equal noise of all signals gives at R1 = 1/s.

    Parameters
    ----------
    signal
        (images, ...).
    flip_angle, repetition_time
        Actual flip angles in radian and times in s, broadcast to the signals.

    Returns
    -------
    (...) in 1/s; where noise has made it so, not positive or not finite.

    References
    ----------
    Helms et al., Magn. Reson. Med. 59, 667 (2008), for h = a / 2.
    """
    h = torch.tan(0.5 * flip_angle)
    x, y = signal / (2 * h), signal * h / repetition_time
    weight = (h / repetition_time + 0.5 / h) ** -2
    weight = weight / weight.sum(0)
    x = x - (weight * x).sum(0)
    return -(weight * x * y).sum(0) / (weight * x**2).sum(0)
