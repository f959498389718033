"""Normalizations inside the layers beside them."""
