"""A stand-in for nvidia-cuda-mps-control: daemon and command line, v2 commands, answers as NVIDIA documents them.

The tests copy it to `nvidia-cuda-mps-control` on a PATH of their own. It needs the standard library alone and runs no
server: server and client pids are what the scenario says.

FAKE_MPS_SCENARIO names a JSON file, read again for every command:
    version         what -v prints ("CUDA MPS 13010")
    no_static       -S is an invalid option
    exit_at_start   exit code with which the daemon ends at once
    mute            commands that are never answered ("*": all)
    die_on          command on which the daemon kills itself
    refuse          {command: text}: answered with the text, exit code 0, as the daemon does
    fail            {command: [exit code, text]}: the command line fails
    answer          {command: text}: any other answer
    status          what get_server_status says ("ACTIVE"); a list: one after the other, the last stays
    clients         pids
    ignore_quit     quit is answered, the daemon stays
    deaf            the daemon ignores SIGTERM too
    bare_ids        sm_partition add prints the ID alone (older releases), not "Partition ID created"
FAKE_MPS_RECORD names a file: each start and each command is appended to it, one JSON line each.
"""

import json
import os
import signal
import socket
import sys

PIPE = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nonexistent")
NO_DAEMON = "Cannot find MPS control daemon process"
CHUNKS, SMS_PER_CHUNK = 16, 8


def scenario():
    try:
        with open(os.environ["FAKE_MPS_SCENARIO"]) as file:
            return json.load(file)
    except (OSError, KeyError):
        return {}


def record(**what):
    path = os.environ.get("FAKE_MPS_RECORD")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(what) + "\n")


class Daemon:
    def __init__(self, static):
        self.static = static
        self.server = None
        self.statuses = 0
        self.default_pct = "100.0"
        self.partitions = {}
        self.names = 0

    def answer(self, line):
        words = line.split()
        command = words[0] if words else ""
        said = scenario()
        if said.get("die_on") == command:
            os.kill(os.getpid(), signal.SIGKILL)
        for kind in ("refuse", "answer"):
            if command in said.get(kind, {}):
                return said[kind][command]
        handler = getattr(self, "do_" + command, None)
        return handler(words[1:], said) if handler else "Unknown command: " + line

    def do_get_default_active_thread_percentage(self, words, said):
        return self.default_pct

    def do_get_server_list(self, words, said):
        if self.server is None and said.get("clients"):
            self.server = os.getpid() + 100_000_000
        return "" if self.server is None else str(self.server)

    def do_start_server(self, words, said):
        if words[:1] != ["-uid"] or len(words) != 2:
            return "Invalid arguments"
        self.server = os.getpid() + 100_000_000
        return ""

    def do_get_server_status(self, words, said):
        if words != [str(self.server)]:
            return "Server " + " ".join(words) + " not found"
        status = said.get("status", "ACTIVE")
        if isinstance(status, list):
            self.statuses += 1
            return status[min(self.statuses, len(status)) - 1]
        return status

    def do_get_client_list(self, words, said):
        if words != [str(self.server)]:
            return "Server " + " ".join(words) + " not found"
        return "\n".join(map(str, said.get("clients", [])))

    def do_terminate_client(self, words, said):
        if len(words) != 2 or words[0] != str(self.server) or int(words[1]) not in said.get("clients", []):
            return "Client " + " ".join(words) + " not found"
        return ""

    def do_sm_partition(self, words, said):
        if not self.static:
            return "Failed: static partitioning mode is not enabled"
        used = sum(self.partitions.values())
        if words[0] == "add":
            chunks = int(words[2])
            if used + chunks > CHUNKS:
                return (
                    f"Failed to fulfill the requested SM partition of {chunks} chunks, "
                    "error CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"
                )
            self.names += 1
            name = f"D{self.names}4+AAA/A="
            self.partitions[name] = chunks
            full = words[1] + "/" + name
            return full if said.get("bare_ids") else f"Partition {full} created"
        if self.partitions.pop(words[2], None) is None:
            return "Failed to remove partition: not found"
        return ""

    def do_lspart(self, words, said):
        if not self.static:
            return "Failed: static partitioning mode is not enabled"
        gpu = os.environ["CUDA_VISIBLE_DEVICES"][:12]
        used = sum(self.partitions.values())
        rows = [
            "GPU           Partition   free    used    free    used    clients",
            "                          chunks  chunks  SM      SM",
            f"{gpu}  -  {CHUNKS - used}  {used}  {(CHUNKS - used) * SMS_PER_CHUNK}  {used * SMS_PER_CHUNK}  -",
        ]
        rows += [f"{gpu}  {name}  -  {n}  -  {n * SMS_PER_CHUNK}  No" for name, n in self.partitions.items()]
        return "\n".join(rows)

    def do_quit(self, words, said):
        return ""


def serve(argv):
    static = "-S" in argv
    said = scenario()
    if static and said.get("no_static"):
        print("nvidia-cuda-mps-control: invalid option -- 'S'", flush=True)
        return 1
    record(
        start=argv,
        pid=os.getpid(),
        env={k: v for k, v in os.environ.items() if k.startswith("CUDA_")},
    )
    if "exit_at_start" in said:
        print("Failed to create the control socket", flush=True)
        return said["exit_at_start"]
    if said.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(os.path.join(PIPE, "nvidia-cuda-mps-control.pid"), "w") as file:
        file.write(str(os.getpid()))
    daemon = Daemon(static)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(PIPE, "control"))
    listener.listen(8)
    muted = []
    while True:
        peer, _ = listener.accept()
        line = peer.makefile().readline().strip()
        record(command=line)
        said = scenario()
        if "*" in said.get("mute", []) or (line.split() or [""])[0] in said.get("mute", []):
            muted.append(peer)
            continue
        peer.sendall(daemon.answer(line).encode())
        peer.close()
        if line.split()[:1] == ["quit"] and not said.get("ignore_quit"):
            listener.close()
            return 0


def command(line):
    said = scenario()
    name = (line.split() or [""])[0]
    if name in said.get("fail", {}):
        code, text = said["fail"][name]
        print(text, flush=True)
        return code
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(os.path.join(PIPE, "control"))
    except OSError:
        print(NO_DAEMON, flush=True)
        return 1
    peer.sendall(line.encode() + b"\n")
    answer = peer.makefile().read()
    if answer:
        print(answer, flush=True)
    return 0


def main(argv):
    if "-v" in argv:
        print(scenario().get("version", "CUDA MPS 13010"))
        return 0
    if "-f" in argv or "-d" in argv:
        return serve(argv)
    for line in sys.stdin:
        if line.strip():
            code = command(line.strip())
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
