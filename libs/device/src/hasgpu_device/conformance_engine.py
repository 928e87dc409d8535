"""The part of the conformance suite that needs the worker's engine, and with it protobuf."""

from __future__ import annotations

from hasgpu.node_agent.v1 import node_agent_pb2 as pb
from hasgpu_core.resources import InstanceState

from hasgpu_device import engine
from hasgpu_device.conformance_tenant import HANG_S, wait_until
from hasgpu_device.control import ControlBlock, Shares
from hasgpu_device.gate import RowGate
from hasgpu_device.worker_config import WorkerConfig

_HANDLER = """
import torch

def load():
    return torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])

def infer(batch, model):
    x = torch.as_tensor(batch["x"], device=next(model.parameters()).device)
    return {"y": model(x).cpu().numpy()}
"""


def check_engine_drains(config: WorkerConfig, shares: Shares) -> int:
    """Lets an engine drain; returns how many batches it finished.

    Args:
        config: Of a worker; its artifact's folder is written to.
        shares: Of its instance.

    Raises:
        AssertionError: It answered otherwise than it should.
    """
    config.entry_path.write_text(_HANDLER, encoding="utf-8")
    answers: dict[int, pb.ExecuteResponse] = {}

    def job(number: int) -> engine.BatchJob:
        tensor = pb.Tensor(name="x", datatype="FP32", shape=[1, 4], raw=bytes(16))
        request = pb.ExecuteRequest(batch=number, items=[pb.BatchItem(rows=1, inputs=[tensor])])
        return engine.BatchJob(request=request, answer=lambda response: answers.__setitem__(number, response))

    with ControlBlock.create(config.control_path, shares) as control, RowGate.create(config.gate_path):
        worker = engine.Engine(config, control, on_change=lambda: None)
        worker.start()
        wait_until("the engine is ready", lambda: worker.state is not InstanceState.LOADING)
        assert worker.state is InstanceState.READY, worker.reason
        for number in range(8):
            worker.submit(job(number))
        worker.is_draining = True
        worker.submit(job(8))
        wait_until("all are answered", lambda: len(answers) == 9)
        worker.stop()
        worker.thread.join(HANG_S)
        assert not worker.thread.is_alive(), "the executor ends"
    kinds = [answers[number].results[0].error.kind for number in range(9)]
    assert kinds == [0] * 8 + [pb.ERROR_KIND_DRAINING], f"8 answers and a refusal, got {kinds}: {answers}"
    assert all(answers[number].emulated == (config.backend == "emulated") for number in range(8))
    return 8
