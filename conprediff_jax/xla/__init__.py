"""Reads compiled programs: operations, FLOPs, bytes, collectives and memory; lists chips."""
