"""What the gateway alone touches of the world: the workers' streams."""
