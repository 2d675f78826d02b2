"""Nipype workflows: wiring only."""
