"""Multi-compartment microscopic diffusion imaging (spherical mean technique)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.models.base import Inputs, Parameter, Reference
from bids_gacelle.engine.models.diffusion import DiffusionModel
from bids_gacelle.engine.physics.powder import stick_average, stick_average_slope
from bids_gacelle.engine.physics.relaxation import relaxed, relaxed_slopes
from bids_gacelle.engine.scheme import DiffusionScheme

_FITTED = (
    Parameter(
        "fn",
        "1",
        "Neurite signal fraction",
        bounds=(0.0, 1.0),
        start=(0.1, 0.9),
        window=(0.0, 1.0),
    ),
    Parameter(
        "d",
        "um^2/ms",
        "Intrinsic diffusivity",
        bounds=(0.1, 3.5),
        start=(0.5, 3.0),
        window=(0.0, 3.0),
    ),
)
_RELAXATION = (
    Parameter(
        "r2a",
        "1/s",
        "Transverse relaxation rate of neurites",
        bounds=(1.0, 50.0),
        start=(5.0, 20.0),
        search=(1.0, 50.0),
        window=(0.0, 30.0),
    ),
    Parameter(
        "r2e",
        "1/s",
        "Transverse relaxation rate of the extra-neurite space",
        bounds=(1.0, 75.0),
        start=(10.0, 50.0),
        search=(1.0, 75.0),
        window=(0.0, 50.0),
    ),
)


class McMicro(DiffusionModel):
    """Sticks and a tortuous extra-neurite space, averaged over directions.

    S = fn Sn + (1 - fn) Se, with Sn = G(b d), Se = exp(-b (1 - fn) d) G(b fn d) and
    G(a) = int_0^1 exp(-a x^2) dx.

    With the option `relaxation`, signals of several echo times are fitted, relative to b=0 at the
    shortest: E = [fn Sn exp(-TE r2a) + (1 - fn) Se exp(-TE r2e)] / N, where N is the numerator
    without diffusion weighting at the shortest echo time. The fraction is then that at an echo
    time of zero.
    """

    name = "mcmicro"
    title = "Multi-compartment microscopic diffusion imaging"
    description = (
        "The powder-averaged signal of each shell was fitted with the two-compartment spherical "
        "mean technique: neurites as sticks, and an extra-neurite space with the same axial "
        "diffusivity whose radial diffusivity follows from the tortuosity, (1 - fn) d. Mean "
        "diffusivity and kurtosis are those of the model's powder average at b = 0. Where "
        "relaxation rates are among the maps, the compartments relax differently over several "
        "echo times, and fractions refer to an echo time of zero."
    )
    references = (
        Reference(
            "kaden2016",
            "Kaden E, Kelm ND, Carson RP, Does MD, Alexander DC. Multi-compartment microscopic "
            "diffusion imaging. NeuroImage 2016;139:346-359.",
            "10.1016/j.neuroimage.2016.06.002",
        ),
    )
    minimum_measurements = 2
    required = ("b",)
    options = {"relaxation": False}  # noqa: RUF012
    compile_from = 4_000_000  # eager steps of so small a model are nearly as fast
    starts = 3
    # Kaden et al. 2016, in vivo at 3 T; relaxation is slower inside neurites.
    tissues = {  # noqa: RUF012
        "grey matter": {"fn": 0.35, "d": 1.8, "r2a": 12.0, "r2e": 18.0},
        "white matter": {"fn": 0.58, "d": 1.9, "r2a": 12.0, "r2e": 20.0},
    }
    parameters: tuple[Parameter, ...] = _FITTED
    derived = (
        Parameter("fe", "1", "Extra-neurite signal fraction", window=(0.0, 1.0)),
        Parameter(
            "deperp", "um^2/ms", "Extra-neurite perpendicular diffusivity", window=(0.0, 2.0)
        ),
        Parameter("md", "um^2/ms", "Mean diffusivity of the powder average", window=(0.0, 2.0)),
        Parameter("pak", "1", "Kurtosis of the powder average", window=(0.0, 2.0)),
    )

    def __init__(
        self, scheme: DiffusionScheme, *, relaxation: bool = False, **options: Any
    ) -> None:
        super().__init__(scheme, relaxation=relaxation, **options)
        self.relaxation = relaxation
        if relaxation:
            self.check_echo_times(scheme)
            self.parameters = (*_FITTED, *_RELAXATION)

    @classmethod
    def wants_echo_decay(cls, options: Mapping[str, Any]) -> bool:
        """Tell whether relaxation is fitted."""
        return bool(options.get("relaxation", False))

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the powder average of each shell; shapes as in `SignalModel.signal`."""
        f, d = params["fn"], params["d"]
        a = self.b(inputs, f) * d
        stick, extra = stick_average(a), torch.exp(-a * (1 - f)) * stick_average(a * f)
        if not self.relaxation:
            return f * stick + (1 - f) * extra
        rates = params["r2a"], params["r2e"]
        return relaxed((f, 1 - f), (stick, extra), rates, *self.echo_times(f))

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by fn and d (and r2a and r2e)."""
        f, d = params["fn"], params["d"]
        b = self.b(inputs, f)
        a = b * d
        stick = stick_average(a)
        inner = stick_average(a * f)
        radial = torch.exp(-a * (1 - f))
        extra = radial * inner
        extra_slope = radial * stick_average_slope(a * f, inner)
        stick_by_d = b * stick_average_slope(a, stick)
        extra_by_d = b * (f * extra_slope - (1 - f) * extra)
        extra_by_f = a * (extra + extra_slope)
        if not self.relaxation:
            by_f = stick - extra + (1 - f) * extra_by_f
            by_d = f * stick_by_d + (1 - f) * extra_by_d
            return f * stick + (1 - f) * extra, torch.stack((by_f, by_d))
        rates = params["r2a"], params["r2e"]
        signal, by = relaxed_slopes((f, 1 - f), (stick, extra), rates, *self.echo_times(f))
        by_f = by.fraction[0] - by.fraction[1] + by.signal[1] * extra_by_f
        by_d = by.signal[0] * stick_by_d + by.signal[1] * extra_by_d
        return signal, torch.stack((by_f, by_d, *by.rate))

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return fe = 1 - fn, deperp = (1 - fn) d, and the cumulants of the powder average.

        ln S = -b md + b^2 md^2 pak / 6 + O(b^3). Over compartments and directions x, the
        diffusivity D = D_perp + (D_par - D_perp) x^2 has the mean md = d [1/3 + 2/3 (1 - fn)^2]
        and, of its square, the mean m2; pak = 3 (m2 - md^2) / md^2.
        """
        f, d = params["fn"], params["d"]
        e = 1 - f
        md = d * (1 + 2 * e**2) / 3
        m2 = d**2 * (f / 5 + e * (e**2 + 2 / 3 * e * f + f**2 / 5))
        return {"fe": e, "deperp": e * d, "md": md, "pak": 3 * (m2 / md**2 - 1)}
