"""Axon diameter mapping with powder averages at several echo times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.models.axcalibersmt import AxCaliberSmt
from bids_gacelle.engine.models.base import NOT_NEGATIVE, Inputs, Parameter
from bids_gacelle.engine.models.surface import (
    SURFACE_LIMITS,
    SURFACE_OPTIONS,
    SURFACE_REFERENCE,
    SurfaceRelaxation,
)
from bids_gacelle.engine.physics.powder import axial_average_slope
from bids_gacelle.engine.physics.relaxation import relaxed, relaxed_slopes
from bids_gacelle.engine.scheme import DiffusionScheme

_ORDER = ("fn", "fcsf", "deperp", "diameter")
_R2E = Parameter(
    "r2e",
    "1/s",
    "Transverse relaxation rate of the extra-neurite space",
    bounds=(1.0, 75.0),
    start=(10.0, 50.0),
    window=(0.0, 50.0),
)


def _parameters(diffusion: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Return the parameters without those of the surface, given those of AxCaliber-SMT."""
    named = {p.name: p for p in diffusion}
    return (*(named[name] for name in _ORDER), _R2E)


class MeAxCaliberSmt(AxCaliberSmt):
    """AxCaliber-SMT with compartments that relax, the axons at their surface.

    E = [(1 - fcsf) (fn Sa exp(-TE Ra) + (1 - fn) Se exp(-TE r2e)) + fcsf Scsf exp(-TE r2csf)] / N

    with Sa, Se and Scsf of `AxCaliberSmt`, Ra = r2a + k2a / radius, and N the numerator without
    diffusion weighting at the shortest echo time. Fractions are those at an echo time of zero.

    The constants are d0, dn, depar and dcsf in um^2/ms, r2csf and r2a (of axoplasm) in 1/s, and
    k2a (surface relaxivity) in um/s. With `fit_k2a` or `fit_r2a` these become parameters of each
    voxel, and diffusion alone tells the diameter; with both, only a prior tells them apart.
    """

    name = "meaxcalibersmt"
    title = "Multi-echo AxCaliber-SMT axon diameter mapping"
    description = (
        "Powder-averaged signals at several b-values, diffusion times and echo times, relative to "
        "b=0 at the shortest echo time, were fitted with AxCaliber-SMT whose compartments relax: "
        "axons as impermeable cylinders of one diameter with a transverse relaxation rate that "
        "grows with their ratio of surface to volume, an extra-neurite space with axial symmetry, "
        "and CSF. Fractions refer to an echo time of zero. Diffusivities other than the "
        "extra-neurite perpendicular one, the relaxation of CSF and, unless mapped, that of "
        "axoplasm and the surface relaxivity were fixed."
    )
    references = (*AxCaliberSmt.references, SURFACE_REFERENCE)
    minimum_measurements = 5
    minimum_echo_times = 2
    required = ("b", "big_delta", "small_delta", "echo_time")
    options = AxCaliberSmt.options | SURFACE_OPTIONS | {"r2csf": 0.5}
    option_limits = AxCaliberSmt.option_limits | SURFACE_LIMITS | {"r2csf": NOT_NEGATIVE}
    tissues = {  # noqa: RUF012
        name: values | {"r2e": 20.0} for name, values in AxCaliberSmt.tissues.items()
    }
    starts = 4
    linear = ()
    parameters = _parameters(AxCaliberSmt.parameters)

    def __init__(
        self,
        scheme: DiffusionScheme,
        *,
        r2a: float = SURFACE_OPTIONS["r2a"],
        k2a: float = SURFACE_OPTIONS["k2a"],
        fit_r2a: bool = False,
        fit_k2a: bool = False,
        r2csf: float = 0.5,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {
            "r2a": r2a,
            "k2a": k2a,
            "fit_r2a": fit_r2a,
            "fit_k2a": fit_k2a,
            "r2csf": r2csf,
        }
        super().__init__(scheme, **own, **options)
        self.check_echo_times(scheme)
        self.r2csf = r2csf
        self._surface = SurfaceRelaxation(r2a, k2a, fit_r2a=fit_r2a, fit_k2a=fit_k2a)
        self.parameters = (*_parameters(self.parameters), *self._surface.parameters)

    @classmethod
    def wants_echo_decay(cls, options: Mapping[str, Any]) -> bool:
        """Tell that it does."""
        return True

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the powder average of each shell; shapes as in `SignalModel.signal`."""
        exponent, _ = self.attenuation(self._across, params["diameter"] / 2, inputs)
        compartments = self._compartments(params, inputs, exponent)
        return relaxed(
            _fractions(params), compartments, self._rates(params), *self.echo_times(params["fn"])
        )

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return signal and derivatives by the parameters, in their order."""
        deperp, fn, fcsf = params["deperp"], params["fn"], params["fcsf"]
        exponent, slope = self.attenuation(self._across, params["diameter"] / 2, inputs)
        axon, extra, csf = self._compartments(params, inputs, exponent)
        b, along_axon, along_extra = self._constants(inputs, deperp)
        by_exponent = axial_average_slope(exponent, along_axon, axon)
        by_radial = axial_average_slope(b * deperp, along_extra, extra)
        signal, by = relaxed_slopes(
            _fractions(params), (axon, extra, csf), self._rates(params), *self.echo_times(fn)
        )
        of_axon, of_extra, of_csf = by.fraction
        surface = {k: by.rate[0] * v for k, v in self._surface.slopes(params).items()}
        columns = {
            "fn": (1 - fcsf) * (of_axon - of_extra),
            "fcsf": of_csf - fn * of_axon - (1 - fn) * of_extra,
            "deperp": by.signal[1] * b * by_radial,
            **surface,
            "diameter": by.signal[0] * 0.5 * slope * by_exponent + surface["diameter"],
            "r2e": by.rate[1],
        }
        return signal, torch.stack([columns[name] for name in self.parameter_names])

    def _rates(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relaxation rates of axons, extra-neurite space and CSF."""
        csf = torch.full_like(params["fn"], self.r2csf)
        return self._surface.rate(params), params["r2e"], csf


def _fractions(params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fractions of axons, extra-neurite space and CSF."""
    fn, fcsf = params["fn"], params["fcsf"]
    return (1 - fcsf) * fn, (1 - fcsf) * (1 - fn), fcsf
