"""What the dwi models are fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.shells import ECHO_TIME_GAP_S, cluster
from bids_gacelle.engine.scheme import DiffusionScheme

_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class B0Groups:
    """The b=0 volumes of each run and echo time, runs in order, the shortest echo time first.

    Attributes
    ----------
    signal : (groups, voxels) their mean in input units, what shells are divided by.
    mean : (groups, voxels) the same, not corrected for Rician noise.
    count : (groups,) number of volumes.
    echo_time : (groups,) in s, or None when that of a run is unknown.
    """

    signal: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    count: _Index
    echo_time: _Float | None


@dataclass(frozen=True)
class PreparedDwi:
    """What the dwi models are fitted to; M measurements: S_0 of all shells, then S_2, ...

    Attributes
    ----------
    signals : (M, voxels), relative to b = 0; NaN where not ``usable``, 0 where left out.
    scheme : the shells; ``n_directions`` is the effective number 1 / sum w^2 of weights w.
    sigma : (M, voxels) standard deviation of each measurement, that of its b=0 signal left out,
        infinite where the measurement is left out; None when the noise is unknown.
    weights : (M,) factors of the loss: 0 for what is left out because the directions of the shell
        do not determine it; for the others 1 or, without ``sigma``, the inverse of the noise
        variance relative to the smallest, for isotropic signals.
    scale_sigma : (groups, voxels) relative standard deviation of the mean b=0 signal of each run
        and echo time; None together with ``sigma``.
    scale_group : (M,) row of ``scale_sigma`` whose b=0 signal divides the measurement.
    b0_groups : the b=0 signals.
    usable : (voxels,) every average is finite and every b=0 average positive.
    directions : (n, 3) unit vectors of the volumes of each shell, in the order of the shells.
    bscale : (voxels,) ratio of actual to nominal b-values, NaN where unknown, or None.
    noise_source : what ``sigma`` comes from, in words.
    warnings : sentences for the user.
    """

    signals: npt.NDArray[np.float32]
    scheme: DiffusionScheme
    sigma: npt.NDArray[np.float32] | None
    weights: _Float
    scale_sigma: npt.NDArray[np.float32] | None
    scale_group: _Index
    b0_groups: B0Groups
    usable: npt.NDArray[np.bool_]
    directions: list[_Float]
    bscale: npt.NDArray[np.float32] | None = None
    noise_source: str = "unknown"
    warnings: list[str] = field(default_factory=list)

    @property
    def b0(self) -> npt.NDArray[np.float32]:
        """Mean b=0 signal of the first run (its shortest echo time) in input units, (voxels,)."""
        return self.b0_groups.signal[0]

    def with_echo_decay(self) -> PreparedDwi:
        """Return S_0 relative to the b=0 signal of the shortest echo time, with b=0 of the others.

        Rows are sorted by echo time, delta, Delta, b. Those of b=0 have the timing of the first
        shell of their echo time and as many ``n_directions`` as there are b=0 volumes; that of the
        shortest echo time would be 1 and is left out. Runs of the shortest echo time stay relative
        to their own b=0 signal, which drift may have changed; shells of another one are scaled by
        the ratio of the b=0 signals of both echo times, each the mean over its runs.

        Measurements that the b=0 signal of the shortest echo time divides share its noise; what
        that of another one adds is noise of their own.

        Raises
        ------
        EngineError
            There are no two known echo times.
        """
        times = self.b0_groups.echo_time
        if times is None or self.scheme.echo_time is None:
            raise EngineError(
                "the echo times of the dwi volumes are not known; without them the decay of "
                "signals with echo time cannot be fitted"
            )
        label = cluster(times, ECHO_TIME_GAP_S, len(times))
        if label.max() == 0:
            raise EngineError(
                f"all dwi volumes have the echo time {1e3 * times[0]:g} ms; a fit of the decay "
                "of signals with echo time needs at least two"
            )
        return _with_echo_decay(self, label)


class _Pool:
    """Means over the runs of each echo time: of b=0 signals, with their noise."""

    def __init__(self, prepared: PreparedDwi, label: _Index) -> None:
        groups, scale = prepared.b0_groups, prepared.scale_sigma
        self.label = label
        member = [np.flatnonzero(label == k) for k in range(label.max() + 1)]
        signal = groups.signal.astype(np.float64)
        self.count = np.array([groups.count[m].sum() for m in member])
        self.signal = np.stack([signal[m].mean(axis=0) for m in member])
        self.mean = np.stack([groups.mean[m].mean(axis=0) for m in member])
        with np.errstate(divide="ignore", invalid="ignore"):  # voxels that are not usable
            share = signal / self.signal[label]
            for m in member:
                share[m] /= len(m)
        self._share = share
        self._variance = np.zeros_like(signal) if scale is None else scale.astype(float) ** 2
        self._member = member

    def sd(self, k: int) -> _Float:
        """Relative standard deviation of the mean of echo time k, (voxels,)."""
        m = self._member[k]
        return np.sqrt(np.sum(self._share[m] ** 2 * self._variance[m], axis=0))

    def sd_against(self, group: int) -> _Float:
        """Relative standard deviation of its echo time's mean over one group's, (voxels,)."""
        m = self._member[self.label[group]]
        own = (m == group)[:, None]
        return np.sqrt(np.sum((self._share[m] - own) ** 2 * self._variance[m], axis=0))


def _with_echo_decay(prepared: PreparedDwi, label: _Index) -> PreparedDwi:
    """Rows of the shells and of b=0; ``label`` is the number of the echo time of each group."""
    n = len(prepared.scheme)
    group = prepared.scale_group[:n]
    later = np.arange(1, label.max() + 1)
    pool = _Pool(prepared, label)
    scheme, order = _echo_scheme(prepared.scheme, label[group], pool.count)
    with np.errstate(divide="ignore", invalid="ignore"):  # voxels that are not usable
        ratio = (pool.signal / pool.signal[0]).astype(np.float32)
        values = prepared.signals[:n] * ratio[label[group]]
        b0 = pool.mean[later] / pool.signal[0]
    references = np.flatnonzero(label == 0)
    # Where several runs have the shortest echo time, their mean divides those of the others.
    shared = 0 if len(references) == 1 else len(references)
    own = np.where(label[group] > 0, shared, np.searchsorted(references, group))
    sigma = scale_sigma = None
    if prepared.sigma is not None and prepared.scale_sigma is not None:
        added = np.stack([pool.sd_against(g) * (label[g] > 0) for g in range(len(label))])
        added = added.astype(np.float32)
        sigma = np.hypot(prepared.sigma[:n] * ratio[label[group]], values * added[group])
        b0_sigma = b0 * np.stack([pool.sd(k) for k in later])
        sigma = np.concatenate([sigma, b0_sigma])[order].astype(np.float32)
        scale_sigma = prepared.scale_sigma[references]
        if shared:
            scale_sigma = np.concatenate([scale_sigma, pool.sd(0)[None]]).astype(np.float32)
    number = scheme.n_directions
    assert number is not None
    return replace(
        prepared,
        signals=np.concatenate([values, b0])[order].astype(np.float32),
        scheme=scheme,
        sigma=sigma,
        weights=number / number.max() if sigma is None else np.ones(len(order)),
        scale_sigma=scale_sigma,
        scale_group=np.concatenate([own, np.full(len(later), shared)])[order],
    )


def _echo_scheme(
    scheme: DiffusionScheme, label: _Index, count: _Index
) -> tuple[DiffusionScheme, _Index]:
    """Return the sorted acquisition with b=0 of the later echo times, and where its rows are from.

    Parameters
    ----------
    scheme, label
        The shells, and the number of the echo time of each.
    count
        Number of b=0 volumes of each echo time.

    Returns
    -------
    scheme
        Of all rows.
    order
        Place of each row among the shells, followed by b=0 of the later echo times.
    """

    def sort(columns: dict[str, npt.NDArray[np.float64] | None], label: _Index) -> _Index:
        keys = [columns[k] for k in ("b", "big_delta", "small_delta")]
        return np.lexsort([*(key for key in keys if key is not None), label])

    columns = scheme.columns()
    by_time = sort(columns, label)
    later = np.arange(1, label.max() + 1)
    first = [by_time[label[by_time] == k][0] for k in later]
    rows = np.concatenate([np.arange(len(scheme)), first])
    columns = {k: None if c is None else c[rows].copy() for k, c in columns.items()}
    for name, values in (("b", 0.0), ("n_directions", count[later])):
        column = columns[name]
        assert column is not None
        column[len(scheme) :] = values
    order = sort(columns, np.concatenate([label, later]))
    taken = {k: None if c is None else c[order] for k, c in columns.items()}
    return DiffusionScheme(**taken), order  # type: ignore[arg-type]
