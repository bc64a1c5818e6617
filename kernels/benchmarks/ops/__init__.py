"""Costs and configurations of one op each; the protocol is in :mod:`benchmarks.report`."""
