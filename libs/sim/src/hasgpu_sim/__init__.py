"""Discrete events in virtual time that drive the policies of hasgpu-core."""
