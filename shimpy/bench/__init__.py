"""Measures how fast a model is in each placement, and what that takes.

It starts workers of its own, one after the other, just as the scheduler would, and talks to
them through leases. Which placements are tried, and what the samples mean, is decided by pure
functions (`candidates`, `summary`, `report`); `measure` and `readings` do the I/O.
"""
