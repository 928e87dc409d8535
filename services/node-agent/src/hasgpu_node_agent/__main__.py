"""`python -m hasgpu_node_agent`: runs the agent of this host until it is told to stop."""

from __future__ import annotations

from hasgpu_runtime.service import run_service

from hasgpu_node_agent.app import serve
from hasgpu_node_agent.settings import load

if __name__ == "__main__":
    run_service("node-agent", load, serve, needs_store=False)
