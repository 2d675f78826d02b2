"""What a protocol can tell of typical tissue: standard deviations expected before any fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, SharedFactor, Voxels
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import PriorArgument, make_objective
from bids_gacelle.engine.uncertainty import EndPoints, assess, standard_deviations

ASSUMED_SNR = 50.0
"""Of one image without diffusion weighting, or the strongest echo, where the noise is unknown."""

TYPICAL = "typical tissue"
"""Name of the tissue in the middle of the start boxes, of models that declare none."""

ESTIMABLE = "estimable"
POOR = "poorly estimable voxel by voxel"
NOT_ESTIMABLE = "not estimable voxel by voxel"
UNDETERMINED = "not determined by this protocol"

# Directions in the space of parameters along which the signals change less than this, relative to
# the most telling direction, are lost in the rounding of any fit (single precision has 6e-8).
_LEAST_CHANGE = 1e-6

ROUNDING = 1e-11
"""As `_LEAST_CHANGE`, of what no precision could tell: fewer measurements than parameters."""
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Expectation:
    """How well one quantity of one tissue can be estimated.

    Attributes
    ----------
    tissue, parameter, unit
        What it is about; the unit of an amplitude is "1": it counts relative to its value.
    value
        Of the tissue.
    sd
        Cramer-Rao bound: the smallest standard deviation of an unbiased estimate; NaN where the
        measurements do not determine it.
    posterior_sd
        Standard deviation with the prior; NaN without one.
    share
        `sd` relative to that of a value anywhere in the start box, in the solver's coordinate;
        NaN for derived quantities.
    verdict
        One of the four of this module; "" for derived quantities that are determined.
    """

    tissue: str
    parameter: str
    unit: str
    value: float
    sd: float
    posterior_sd: float
    share: float
    verdict: str


def expected_sd(
    model: SignalModel,
    sigma: ArrayLike,
    *,
    scale_sigma: ArrayLike | None = None,
    scale_group: ArrayLike | None = None,
    prior: PriorArgument = None,
) -> list[Expectation]:
    """Return what a voxel of each typical tissue will tell, from the Cramer-Rao bound.

    The covariance of an unbiased estimate is at least the inverse of the Fisher information
    F = J^T diag(1/sigma^2) J, with J the derivatives of the signals by the parameters at the
    values of the tissue (Cramer 1946). Noise that measurements share adds a term of rank one for
    each group, as in the standard deviations that `fit` reports, whose expectation this is; a
    normal prior adds its precision to F. Derived quantities follow by first-order propagation.
    The noise is taken as Gaussian.

    An estimate is worth its while where it says more than the start box, within which tissue lies
    anyway. Relative to the standard deviation of a uniform distribution over that box (its width
    in the solver's coordinate over the root of 12; for an amplitude the box reaches from 0 to
    twice its value), a bound below 1/2 is "estimable", below 1 "poorly estimable voxel by voxel",
    beyond "not estimable voxel by voxel". Where fewer measurements than parameters are
    independent of each other, all are "not determined by this protocol".

    Parameters
    ----------
    model
        With its acquisition; `model.tissues` holds the values, the middle of the start boxes
        stands in for what it does not name or what options of the model put out of bounds.
    sigma
        () or (measurements,) standard deviation of the noise, in units of the signal; for a model
        with an amplitude, of the largest signal. Infinite for a measurement that is left out.
    scale_sigma, scale_group
        (groups,) relative standard deviation of factors that measurements share, and
        (measurements,) the factor of each.
    prior
        As in `fit`.

    Returns
    -------
    One entry per tissue and parameter, then per derived quantity, in order.

    Raises
    ------
    EngineError
        The noise does not fit the model.
    """
    kernel = _kernel(model)
    tissues = _tissues(model)
    position = _positions(kernel, tissues)
    signal = kernel.signal(position, {})
    noise = _noise(sigma, model.n_measurements)[:, None]
    information = 1 / noise**2
    mean = information.mean(0)
    voxels = Voxels(
        signal,
        (information / mean).expand_as(signal),
        noise_variance=(1 / mean).expand(len(tissues)),
    )
    shared = _shared(scale_sigma, scale_group, model.n_measurements, len(tissues))
    full = _ranks(kernel, position) == len(position)
    sd, steps = _deviations(kernel, position, voxels, shared)
    stiffness = _stiffness(model, prior)
    posterior = {name: torch.full_like(v, torch.nan) for name, v in sd.items()}
    if stiffness is not None:
        pulled = voxels._replace(
            target=position, stiffness=(stiffness / mean)[:, None].expand_as(position)
        )
        posterior, _ = _deviations(kernel, position, pulled, shared)
    shares = steps / (_widths(kernel, position) / 12**0.5)
    return _expectations(kernel, tissues, position, (sd, posterior, shares), full)


def independent_measurements(model: SignalModel, least_change: float = _LEAST_CHANGE) -> int:
    """Return the number of independent measurements that the protocol gives of the parameters.

    That is the largest rank of the derivatives of the signals by the parameters over the typical
    tissues and some points of the start boxes; never more than there are parameters. Directions
    along which signals change less than `least_change`, relative to the most telling one, do not
    count.
    """
    kernel = _kernel(model)
    typical = _positions(kernel, _tissues(model))
    # A symmetric signal does not change in the very middle of a box: elsewhere it does.
    step = torch.arange(1, len(typical) + 1, dtype=torch.float64)[:, None]
    share = 0.15 + 0.7 * torch.frac(_GOLDEN * step + torch.tensor([0.0, 1 / 3, 2 / 3]))
    low, high = torch.tensor(kernel.box, dtype=torch.float64).unbind(1)
    probes = low[:, None] + (high - low)[:, None] * share
    probes = torch.where(kernel.width.isnan(), typical[:, :1], probes)
    return int(_ranks(kernel, torch.cat((typical, probes), 1), least_change).max())


def _ranks(kernel: Kernel, position: Tensor, least_change: float = _LEAST_CHANGE) -> Tensor:
    """Return the rank of the Jacobian, in widths of the start boxes, at positions (P, points).

    Where a derivative is not a finite number, nothing speaks against any parameter.
    """
    _, columns = kernel.signal_and_jacobian(position, {})
    jacobian = (torch.stack(columns) * _widths(kernel, position)[:, None]).movedim(-1, 0)
    finite = jacobian.isfinite().all(-1).all(-1)
    singular = torch.linalg.svdvals(torch.where(finite[:, None, None], jacobian, 0.0))
    ranks = (singular > least_change * singular[:, :1]).sum(1)
    return torch.where(finite, ranks, len(position))


def _widths(kernel: Kernel, position: Tensor) -> Tensor:
    """Return the widths of the start boxes, (P, points); of an amplitude twice its value."""
    return torch.where(kernel.width.isnan(), 2 * position, kernel.width)


def assumed_sigma(model: SignalModel, snr: float = ASSUMED_SNR) -> NDArray[np.float64]:
    """Return the noise (measurements,) of a protocol whose single images have this SNR.

    The noise of a mean over n directions is smaller by the root of n, that of the rotational
    invariant of degree l by the root of n (2 l + 1).
    """
    count = getattr(model.scheme, "n_directions", None)
    if count is None:  # single images, or single real and imaginary parts
        return np.full(model.n_measurements, 1 / snr)
    degrees = 2 * (np.arange(model.n_measurements) // len(count))
    return 1 / (snr * np.sqrt(np.resize(count, model.n_measurements) * (2 * degrees + 1)))


def image_snr(model: SignalModel, sigma: NDArray[np.floating]) -> float:
    """Return the SNR of one image that noise (measurements,) of averages comes from (median)."""
    return float(np.median((assumed_sigma(model, 1.0) / sigma)[np.isfinite(sigma)]))


def sentences(
    model: SignalModel,
    found: Sequence[Expectation],
    *,
    snr: float,
    assumed: bool = False,
    prior: bool = False,
) -> list[str]:
    """Say which parameters the protocol does not tell well: a sentence for those told alike.

    Parameters
    ----------
    model, found
        What `expected_sd` was given, and what it returned.
    snr, assumed
        Of one image, and whether it is a guess.
    prior
        Whether a prior is in use and need not be advised.
    """
    if lost := undetermined(model):
        return [f"{lost}."]
    said: dict[str, list[str]] = {}
    at = f"at {'an assumed SNR of' if assumed else 'SNR'} {_short(snr)}"
    advice = f"; use {'' if prior else 'a prior, '}a spatial term or ROI averages"
    for name in model.parameter_names:
        for verdict in (UNDETERMINED, NOT_ESTIMABLE, POOR):
            rows = [e for e in found if e.parameter == name and e.verdict == verdict]
            if not rows:
                continue
            if verdict == UNDETERMINED:
                about = f"{verdict} in {_listed(e.tissue for e in rows)}."
                said.setdefault(about, []).append(name)
                continue
            expected = _listed(f"{_quantity(e)} in {e.tissue}" for e in rows)
            end = advice if verdict == NOT_ESTIMABLE else ""
            about = f"expected SD {expected} {at}: {verdict}{end}."
            said.setdefault(about, []).append(name)
    return [f"{model.name}: {', '.join(names)}: {about}" for about, names in said.items()]


def undetermined(model: SignalModel, least_change: float = _LEAST_CHANGE) -> str:
    """Say that the measurements are too few, or too alike, for the parameters; "" if they are not.

    Parameters
    ----------
    model
        With its acquisition.
    least_change
        As in `independent_measurements`.
    """
    rank, wanted = independent_measurements(model, least_change), len(model.parameters)
    if rank == wanted:
        return ""
    plural = "s" if rank != 1 else ""
    return (
        f"{model.name}: {', '.join(model.parameter_names)}: {UNDETERMINED}, which gives {rank} "
        f"independent measurement{plural} for {wanted} parameters"
    )


def _kernel(model: SignalModel) -> Kernel:
    return Kernel(model, make_objective(model, "gaussian", "l2", None), torch.float64, _CPU)


_CPU = torch.device("cpu")


def _tissues(model: SignalModel) -> Mapping[str, Mapping[str, float]]:
    """Return the tissues that the model declares, or the one in the middle of its start boxes."""
    return model.tissues or {TYPICAL: {}}


def _positions(kernel: Kernel, tissues: Mapping[str, Mapping[str, float]]) -> Tensor:
    """Return the tissues in solver coordinates, (parameters, tissues).

    An amplitude makes the largest signal 1, as the fit scales its data.
    """
    columns = zip(
        kernel.model.parameters, kernel.box, kernel.lower[:, 0], kernel.upper[:, 0], strict=True
    )
    rows = []
    for parameter, box, low, high in columns:
        middle = 1.0 if parameter.amplitude else sum(box) / 2
        named = [values.get(parameter.name) for values in tissues.values()]
        row = [middle if v is None else parameter.to_coordinate(v) for v in named]
        rows.append([z if low < z < high else middle for z in row])
    position = torch.tensor(rows, dtype=torch.float64)
    if kernel.amplitude is not None:
        largest = kernel.signal(position, {}).abs().amax(0)
        index = torch.arange(len(position))[:, None] == kernel.amplitude
        position = torch.where(index, position / largest, position)
    return position


def _noise(sigma: ArrayLike, n: int) -> Tensor:
    noise = np.asarray(sigma, dtype=np.float64)
    usable = (noise > 0).all() and np.isfinite(noise).any()
    if noise.shape not in ((), (n,)) or not usable:
        raise EngineError(
            f"sigma has shape {noise.shape}; one positive number, or one for each of the {n} "
            "measurements, is needed."
        )
    return torch.tensor(np.broadcast_to(noise, n).copy())


def _shared(
    scale_sigma: ArrayLike | None, scale_group: ArrayLike | None, n: int, tissues: int
) -> SharedFactor | None:
    if scale_sigma is None or scale_group is None:
        return None
    spread = torch.as_tensor(np.asarray(scale_sigma, np.float64))
    group = torch.as_tensor(np.asarray(scale_group, np.int64))
    if spread.ndim != 1 or group.shape != (n,):
        raise EngineError(
            f"scale_sigma has shape {tuple(spread.shape)} and scale_group {tuple(group.shape)}; "
            f"(groups,) and ({n},) are needed."
        )
    return SharedFactor(spread[:, None].expand(-1, tissues), group)


def _stiffness(model: SignalModel, prior: PriorArgument) -> Tensor | None:
    """Return the precision of the prior in solver coordinates, (parameters,)."""
    known = make_objective(model, "gaussian", "l2", prior).prior
    if known is None:
        return None
    precision = [
        float(np.median(known.sd[name])) ** -2 if name in known.sd else 0.0
        for name in model.parameter_names
    ]
    return torch.tensor(precision, dtype=torch.float64)


def _deviations(
    kernel: Kernel, position: Tensor, voxels: Voxels, shared: SharedFactor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return standard deviations by name and, of the parameters, in solver coordinates."""
    common, group = (None, None) if shared is None else shared
    verdict = assess(kernel, EndPoints(position, voxels, common), group)
    steps = torch.diagonal(verdict.covariance, dim1=0, dim2=1).T.sqrt()
    return standard_deviations(kernel, position, verdict.at_bound, verdict.covariance), steps


def _expectations(
    kernel: Kernel,
    tissues: Mapping[str, Mapping[str, float]],
    position: Tensor,
    found: tuple[dict[str, Tensor], dict[str, Tensor], Tensor],
    full: Tensor,
) -> list[Expectation]:
    sd, posterior, shares = found
    params = kernel.parameters(position)
    values = params | kernel.model.derive(params)
    out = []
    for t, tissue in enumerate(tissues):
        for i, about in enumerate((*kernel.model.parameters, *kernel.model.derived)):
            name = about.name
            value, bound = float(values[name][t]), float(sd[name][t])
            fitted = i < len(shares)
            bound = bound if full[t] else float("nan")
            share = float(shares[i, t]) if fitted and full[t] else float("nan")
            unit = 1 / value if about.amplitude else 1.0
            out.append(
                Expectation(
                    tissue,
                    name,
                    "1" if about.amplitude else about.unit,
                    value,
                    bound * unit,
                    float(posterior[name][t]) * unit,
                    share,
                    _verdict(share, fitted) if np.isfinite(bound) else UNDETERMINED,
                )
            )
    return out


def _verdict(share: float, fitted: bool) -> str:
    if not fitted:
        return ""
    return ESTIMABLE if share < 0.5 else POOR if share < 1 else NOT_ESTIMABLE


def _listed(words: Iterable[str]) -> str:
    return " and ".join(words)


def _quantity(found: Expectation) -> str:
    return f"{_short(found.sd)} {found.unit if found.unit != '1' else ''}".strip()


def _short(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"
