"""The device layer: backends, the token gate, the control block, the worker."""
