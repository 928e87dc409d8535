"""What touches the world for every service: wire, bus, store, RPC, loops, telemetry."""
