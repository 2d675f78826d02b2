"""Nipype interfaces that join engine, bids, spatial and report."""
