"""The command hasgpu."""
