"""Scaling, placement, routing and admission as pure functions: services and the simulator call the same."""
