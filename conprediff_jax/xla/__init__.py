"""Compiled programs read: operations, FLOPs, bytes, collectives, memory, chips."""
