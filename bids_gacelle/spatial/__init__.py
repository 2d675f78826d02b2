"""Masks, grids, motion and regions of interest."""

from bids_gacelle.spatial.grids import describe_grid, load_volumes, resample_to, same_grid
from bids_gacelle.spatial.masks import load_mask, quick_mask
from bids_gacelle.spatial.motion import Displacement, displacement
from bids_gacelle.spatial.rois import read_lookup, roi_statistics

__all__ = [
    "Displacement",
    "describe_grid",
    "displacement",
    "load_mask",
    "load_volumes",
    "quick_mask",
    "read_lookup",
    "resample_to",
    "roi_statistics",
    "same_grid",
]
