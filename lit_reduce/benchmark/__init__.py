"""Latency, phases, FLOPs and memory of a reducer against the plain backbone."""
