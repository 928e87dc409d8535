"""One per host: devices, workers, quotas, profiling runs."""
