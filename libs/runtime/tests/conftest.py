from hasgpu_runtime.testing import (  # noqa: F401  fixtures
    background_errors,
    manual_clock,
    memory_bus,
    memory_store,
    nats_bus,
    nats_server,
    redis_server,
    redis_store,
)
