"""Myelin water imaging from the echoes of one flip angle."""

from __future__ import annotations

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Reference
from bids_gacelle.engine.models.threepools import (
    PARAMETERS,
    TIMES,
    WHARTON,
    WHITE_MATTER,
    ThreePools,
    typical,
)


class GreMwi(ThreePools):
    """Myelin, intra-axonal and extra-cellular water in a multi-echo gradient-echo scan.

    `ThreePools` with A_MW = MWF and A_IEW = 1 - MWF. All pools are weighted by T1 alike, so that
    MWF is too large the shorter the T1 of myelin water is for the repetition time.
    """

    name = "gremwi"
    title = "Gradient-echo myelin water imaging"
    description = (
        "The signal of every voxel over the echo times of a multi-echo gradient-echo scan was "
        "fitted with three pools of water, in myelin, inside and outside of axons, each with its "
        "own effective transverse relaxation rate and frequency; where diffusion informed the "
        "fit, frequencies and dephasing followed from hollow cylinders."
    )
    references = (
        Reference(
            "nam2015",
            "Nam Y, Lee J, Hwang D, Kim DH. Improved estimation of myelin water fraction using "
            "complex model fitting. NeuroImage 2015;116:214-221.",
            "10.1016/j.neuroimage.2015.03.081",
        ),
        WHARTON,
    )
    kind = "megre"
    minimum_measurements = 6
    required = ("echo_time", "field_strength")
    plausibility = ("first-echo", "r2star")
    options = ThreePools.SHARED_OPTIONS
    compile_from = 1_000_000  # a step of so many parameters takes minutes to compile
    tissues = {  # noqa: RUF012
        "white matter": WHITE_MATTER,
    }
    parameters = PARAMETERS
    derived = TIMES

    def magnetisation(self, params: dict[str, Tensor], inputs: Inputs | None) -> Tensor:
        """Return the fractions of myelin water and of the rest."""
        mwf = params["MWF"]
        return torch.stack((mwf, 1 - mwf))[:, None, None]

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return a start around the single R2* of the magnitude."""
        magnitude = torch.hypot(*data.unflatten(0, (2, -1))) if self.is_complex else data
        rate = self.decay(magnitude)[0]
        return self.start_from(data, inputs, typical(rate, signed=self.is_complex))
