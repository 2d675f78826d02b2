"""Signal models and solvers: from arrays of measurements to maps with their uncertainty.

Knows nothing of BIDS, Nipype or files, and needs torch and numpy only.
"""
from bids_gacelle.engine.models import Parameter, Reference, SignalModel, get_model, list_models
from bids_gacelle.engine.scheme import DiffusionScheme, GradientEchoScheme
