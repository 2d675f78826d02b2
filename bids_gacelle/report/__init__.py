"""The page by which a person judges the maps of a subject."""

from bids_gacelle.report.page import build_subject_report

__all__ = ["build_subject_report"]
