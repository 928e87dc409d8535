"""The store port, on Redis and in memory."""
