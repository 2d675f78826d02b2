"""Quantitative MRI maps with their uncertainty, from a BIDS dataset."""

__version__ = "0.1.0"
