"""From volumes to what the models are fitted to.

Diffusion-weighted volumes become a few numbers per shell (`prepare_dwi`), complex gradient echoes
lose the field and the initial phase of their voxel (`demodulate`).

All volumes of one shell (same b, Delta, delta and echo time) become one powder average S_0 and,
on request, rotational invariants S_2, S_4, ... divided by the b=0 signal of their own run and
echo time, each with its standard deviation. No voxel ever sees its neighbours. The noise of a b=0
signal is common to all shells that it divides; it is handed on apart from theirs.
"""

from bids_gacelle.engine.prepare.directions import unevenness
from bids_gacelle.engine.prepare.dwi import prepare_dwi
from bids_gacelle.engine.prepare.gre import Demodulated, demodulate
from bids_gacelle.engine.prepare.harmonics import real_sh, sh_fit_matrix
from bids_gacelle.engine.prepare.phase import PhaseScale, phase_scale
from bids_gacelle.engine.prepare.prepared import B0Groups, PreparedDwi
from bids_gacelle.engine.prepare.volumes import DwiVolumes

__all__ = [
    "B0Groups",
    "Demodulated",
    "DwiVolumes",
    "PhaseScale",
    "PreparedDwi",
    "demodulate",
    "phase_scale",
    "prepare_dwi",
    "real_sh",
    "sh_fit_matrix",
    "unevenness",
]
