"""A child process that holds one engine and does what it is told: one JSON line in, one JSON line out."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from engines import Peer, Spec, open_peer

OWN = ("lime_edge.targets.registry", "lime_edge.runtimes.onnx.decoder", "safetensors.numpy", "methods")
IMPORTS = {
    "ours": OWN,
    "lora": OWN,
    "prompt": OWN,
    "executorch": ("lime_edge.targets.registry", "lime_edge.runtimes.executorch.decoder", "safetensors.numpy"),
    "genai": ("onnxruntime_genai",),
    "llama": ("llama_cpp",),
    "torch": ("torch", "transformers", "peft"),
}


class Worker:
    """Answers commands; `peer` is None until `load`."""

    def __init__(self) -> None:
        self.peer: Peer | None = None
        self.spec: Spec = {}

    def imports(self, engine: str) -> dict[str, int]:
        """Import what the engine needs, so that loading is timed without it."""
        for name in IMPORTS[engine]:
            importlib.import_module(name)
        return read_memory()

    def load(self, spec: Spec) -> dict[str, Any]:
        """Load, or load again after letting go of what was loaded."""
        self.peer, self.spec = None, spec
        gc.collect()
        begin = time.perf_counter()
        self.peer = open_peer(spec)
        return {"seconds": time.perf_counter() - begin, "experts": self.peer.experts, **read_memory()}

    def round(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Seconds of a prompt and of every decode step after it, and the tokens."""
        assert self.peer is not None
        begin = time.perf_counter()
        self.peer.start(prompt)
        first, steps, tokens = time.perf_counter() - begin, [], []
        for _ in range(count):
            begin = time.perf_counter()
            tokens.append(self.peer.step())
            steps.append(time.perf_counter() - begin)
        return {"first": first, "steps": steps, "tokens": tokens}

    def switches(self, count: int) -> dict[str, Any]:
        """Seconds of `count` bare swaps between experts in random order; the first `experts` warm up."""
        assert self.peer is not None
        draw, times = random.Random(0), []
        for index in range(self.peer.experts):
            self.peer.switch(index)
        for _ in range(count):
            index = draw.randrange(self.peer.experts)
            begin = time.perf_counter()
            self.peer.switch(index)
            times.append(time.perf_counter() - begin)
        return {"seconds": times, **read_memory()}

    def first_token(self, prompt: list[int], index: int) -> dict[str, float]:
        """Seconds from the switch to the logits of a prompt under the other expert."""
        assert self.peer is not None
        begin = time.perf_counter()
        self.peer.switch(index % self.peer.experts)
        self.peer.start(prompt)
        return {"seconds": time.perf_counter() - begin}

    def reload(self, prompt: list[int], path: str | None = None) -> dict[str, float]:
        """Seconds to let go of the model, load one anew, and get the logits of a prompt."""
        begin = time.perf_counter()
        self.peer = None
        gc.collect()
        self.peer = open_peer(self.spec | ({"path": path} if path else {}))
        loaded = time.perf_counter() - begin
        self.peer.start(prompt)
        return {"load": loaded, "seconds": time.perf_counter() - begin}

    def touch(self, prompt: list[int]) -> dict[str, int]:
        """Use every expert once; memory after it."""
        assert self.peer is not None
        for index in range(self.peer.experts):
            self.peer.switch(index)
            self.peer.start(prompt)
        return read_memory()

    def logits(self, prompt: list[int], file: str | None = None) -> dict[str, int]:
        """Run a prompt and write the logits of its last position to a .npy file, if any; memory after it."""
        assert self.peer is not None
        self.peer.start(prompt)
        if file:
            np.save(file, self.peer.peek())
        return read_memory()


def read_memory() -> dict[str, int]:
    """Resident bytes now and at most so far. Source: proc_pid_status(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"rss_bytes": found["VmRSS"], "peak_rss_bytes": found["VmHWM"]}


def main() -> None:
    """Serve until standard input ends. Whatever the engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"ok": getattr(worker, request["do"])(**request["with"])}
        except Exception as error:  # told to the parent, which decides
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
