"""Inverted residuals in 8-bit integers."""
