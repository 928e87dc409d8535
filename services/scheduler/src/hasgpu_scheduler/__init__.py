"""Binds instances to nodes, GPUs and rows."""
