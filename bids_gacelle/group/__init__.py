"""What comes of the participant-level tables of many subjects; pure functions of files."""

from bids_gacelle.group.tables import NothingToMerge, merge_tables

__all__ = ["NothingToMerge", "merge_tables"]
