"""What the entropies of learned pointers must keep to; the defaults of gates, and what verdicts are by."""

MIN_H1 = 0.5
"""Smallest H1 as a share of log k, or of log n where n is smaller. Below: few rows have most of the IDs."""
MIN_H2_GAIN = 0.1
"""Smallest H2 − H1 as a share of what it is for random pointers, or of what n IDs leave room for. Below: one column
follows from another."""
MIN_LEARNED = 0.005
"""How far H1 or H2 must lie below that of random pointers, as a share of it. Below: as random as a hash."""
