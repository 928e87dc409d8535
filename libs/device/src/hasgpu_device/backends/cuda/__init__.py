"""NVIDIA GPUs, shared by MPS and green contexts: the backend inside a worker, and what the agent needs beside it.

| module | gives |
|---|---|
| `driver` | `CudaDriver`: libcuda through ctypes |
| `faults` | names of the driver's errors, and which of them a process does not survive |
| `rungs` | where partitions lie, and the green contexts and streams that hold them |
| `layer_clock` | about how much device time a running segment has used |
| `staging` | weights through pinned memory onto the device |
| `programs`, `graphs` | a model as a list of steps; CUDA graphs of it |
| `backend` | `CudaBackend` |
| `mps_control`, `mps` | MPS's control program; `MpsDaemon`: one GPU's daemon, and its clients' environment |
| `nvml`, `xids` | `Nvml`: inventory, health and telemetry of the host's GPUs |
| `probe_findings` | `choose_mode`, `capabilities`, `ProbeCache`: which mode follows from what was found out |
| `probe`, `probe_steps`, `smid` | `Probe`: finds out what a GPU can enforce, each step in a process of its own |
| `fault_policy` | `decide`: what is done when a GPU, its MPS server or a worker fails |
"""
