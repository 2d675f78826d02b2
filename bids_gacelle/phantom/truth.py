"""What is known of gradient echoes with a phase and of myelin water, as maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from bids_gacelle.engine import Parameter, get_model
from bids_gacelle.phantom.head import Head
from bids_gacelle.phantom.myelin import MWI
from bids_gacelle.phantom.tissue import POOLS

Maps = tuple[tuple[Parameter, np.ndarray], ...]
"""Quantities, in the units that maps have, and their values (x, y, z)."""

_MEANINGFUL_WITHOUT_MYELIN = {"S0", "MWF", "R1IEW", "T1IEW", "R2sEW", "T2sEW"}


def true_map(values: np.ndarray, meaningful: np.ndarray, head: Head) -> np.ndarray:
    """Return values (voxels,) as a map (x, y, z); NaN outside the brain and where meaningless."""
    volume = np.full(head.inside.shape, np.nan)
    volume[head.inside] = np.where(meaningful & head.anatomy.brain[head.inside], values, np.nan)
    return volume


def myelin_truth(pools: Mapping[str, np.ndarray], field: np.ndarray, head: Head) -> Maps:
    """Return maps of all that `mcrmwi` looks for, of the field and of the initial phase."""
    names = (*POOLS, "S0", "freqMW", "freqIW")
    model = get_model("mcrmwi")(MWI.scheme(), steady_state="epgx")
    params = {name: torch.from_numpy(pools[name]) for name in names}
    known = {key: value.numpy() for key, value in (params | model.derive(params)).items()}
    everywhere = np.ones(head.inside.sum(), dtype=bool)
    myelin = pools["MWF"] > 0
    maps = []
    for parameter in (*model.parameters, *model.derived):
        if parameter.name not in known:
            continue  # a correction to what is estimated from the data
        values, about = known[parameter.name], parameter
        if parameter.name == "MWF":
            values, about = 100 * values, replace(parameter, unit="percent")
        elif parameter.unit == "ppm":
            values, about = MWI.hertz_per_ppm * values, replace(parameter, unit="Hz")
        always = parameter.name in _MEANINGFUL_WITHOUT_MYELIN
        maps.append((about, true_map(values, everywhere if always else myelin, head)))
    phase = Parameter("pini", "rad", "Phase at an echo time of zero")
    maps.append((phase, true_map(head.initial_phase(), everywhere, head)))
    return (*maps, *field_truth(field, head))


def field_truth(field: np.ndarray, head: Head) -> Maps:
    """Return maps in Hz of the field, (images, voxels) in ppm: the mean, and each of several."""
    everywhere = np.ones(head.inside.sum(), dtype=bool)
    hertz = MWI.hertz_per_ppm * field
    about = Parameter("freqBKG", "Hz", "Field offset, mean over flip angles")
    maps = [(about, true_map(hertz.mean(axis=0), everywhere, head))]
    for number, values in enumerate(hertz if len(hertz) > 1 else (), 1):
        about = Parameter(f"freqBKG{number}", "Hz", f"Field offset at flip angle {number}")
        maps.append((about, true_map(values, everywhere, head)))
    return tuple(maps)


def fibre_inputs(pools: Mapping[str, np.ndarray], head: Head) -> Maps:
    """Return what diffusion could tell: one fibre in every voxel of the brain."""
    everywhere = np.ones(head.inside.sum(), dtype=bool)
    angle = Parameter("theta", "rad", "Angle of the fibres to the static field")
    share = Parameter("ff", "1", "Share of the fibre among those of the voxel")
    water = Parameter("iwf", "1", "Intra-axonal share of the water outside of myelin")
    return (
        (angle, true_map(pools["theta"], everywhere, head)),
        (share, true_map(np.ones_like(pools["theta"]), everywhere, head)),
        (water, true_map(pools["IWF"], everywhere, head)),
    )
