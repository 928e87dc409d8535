"""`python -m hasgpu_node_agent`: runs the agent of this host until it is told to stop."""

from __future__ import annotations

from hasgpu_runtime.service import run_service

from hasgpu_node_agent.app import serve
from hasgpu_node_agent.settings import AgentSettings, load


def describe(settings: AgentSettings) -> dict[str, str]:
    """Returns what the traces' resource says of this host; a name that is still to be taken is left out."""
    node = "" if settings.node.endswith("*") else settings.node
    told = {"hasgpu.node": node, "hasgpu.device_backends": ",".join(sorted({d.kind for d in settings.devices}))}
    return {name: value for name, value in told.items() if value}


if __name__ == "__main__":
    run_service("node-agent", load, serve, needs_store=False, describe=describe)
