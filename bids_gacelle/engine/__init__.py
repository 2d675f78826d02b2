"""Signal models and solvers: from arrays of measurements to maps with their uncertainty.

Knows nothing of BIDS, Nipype or files, and needs torch and numpy only.
"""

from bids_gacelle.engine.adequacy import expected_sd
from bids_gacelle.engine.blocks import Progress
from bids_gacelle.engine.errors import EngineError, FitInterrupted
from bids_gacelle.engine.fit import fit
from bids_gacelle.engine.models import (
    Parameter,
    Reference,
    SignalModel,
    get_model,
    list_models,
    signal_model,
    use_models,
)
from bids_gacelle.engine.noise import sigma_from_repeats
from bids_gacelle.engine.prepare import DwiVolumes, PreparedDwi, prepare_dwi
from bids_gacelle.engine.regularise import TGV2, TV, Custom, MapPrior, MeshTV
from bids_gacelle.engine.result import FLAG_NAMES, FitResult
from bids_gacelle.engine.scheme import DiffusionScheme, GradientEchoScheme

__all__ = [
    "FLAG_NAMES",
    "TGV2",
    "TV",
    "Custom",
    "DiffusionScheme",
    "DwiVolumes",
    "EngineError",
    "FitInterrupted",
    "FitResult",
    "GradientEchoScheme",
    "MapPrior",
    "MeshTV",
    "Parameter",
    "PreparedDwi",
    "Progress",
    "Reference",
    "SignalModel",
    "expected_sd",
    "fit",
    "get_model",
    "list_models",
    "prepare_dwi",
    "sigma_from_repeats",
    "signal_model",
    "use_models",
]
