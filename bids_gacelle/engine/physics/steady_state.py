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
