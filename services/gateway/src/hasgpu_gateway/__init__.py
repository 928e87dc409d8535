"""The front door: Open Inference Protocol, function registry, queues, batches, routes."""
