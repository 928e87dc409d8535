"""The one catalogue of span names. Units, where a span carries numbers, end the attribute's name."""

from __future__ import annotations

from typing import Literal

SpanName = Literal[
    "rpc.server",  # any RPC, by its callee; attribute rpc.method
    "gateway.infer",  # a request, from its arrival to its answer
    "gateway.queue",  # ... the part that it waited in its function's queue
    "gateway.batch",  # a batch, from forming it to its last answer; links to the requests in it
    "worker.batch",  # a batch in the worker, line included
    "worker.gate_wait",  # ... the part that it waited at the device gate
    "worker.execute",  # ... the part that it ran
    "scaler.decide",  # observing, deciding and writing of one function's change
    "scheduler.plan",  # from a wanted set of instances to the nodes' plans
    "agent.apply_plan",  # starting and retiring instances as a plan says
    "agent.apply_vertical",  # writing a new share to control blocks
    "agent.applied",  # ... until the worker reports the epoch in force
    "agent.profile",  # measuring a function on a device
    "rapp.train",  # fitting a device model's predictor
]
