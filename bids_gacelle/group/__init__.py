"""What comes of the participant-level tables of many subjects; pure functions of files."""

from bids_gacelle.group.tables import merge_tables

__all__ = ["merge_tables"]
