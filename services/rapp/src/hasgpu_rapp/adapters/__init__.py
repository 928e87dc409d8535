"""Where rapp touches the world: its files and the node agents."""
