"""What touches the world: processes and their folders, workers' services, the bus, unpacked artifacts."""
