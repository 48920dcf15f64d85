"""Loading a bundle's ONNX graphs: execution providers, threads, operators."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need, suggest
from lime_edge.runtimes.onnx.operators import find_cuda_library, find_library
from lime_edge.runtimes.onnx.places import CUDA
from lime_edge.session.engines import Placement, SessionOptions
from lime_edge.targets.entries import OnnxFacts

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need("onnxruntime", "onnx") from error

PACKAGES = {  # which build of ONNX Runtime brings an execution provider
    CUDA: "onnxruntime-gpu (x86-64), or NVIDIA's own build on a Jetson: docs/jetson.md",
    "CoreMLExecutionProvider": "onnxruntime on macOS",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "DmlExecutionProvider": "onnxruntime-directml",
}
SUFFIX = "ExecutionProvider"
RECORD = "session.record_ep_graph_assignment_info"
OPERATORS = "LIME_EDGE_OPERATORS"
CUDA_OPTIONS = {"enable_cuda_graph": "1"}  # a decode step is captured at its first run and replayed from then on


class Graphs:
    """A bundle's loaded graphs: the pinned one, and from its first use on the routed one over the same weight file."""

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = bundle.manifest.facts_of(OnnxFacts)
        self._load = partial(load_graph, bundle, options=options)
        self._routed_file = facts.routed
        self._routed_graph: ort.InferenceSession | None = None
        self.takes_expert = facts.expert_input
        self.pinned = self._load(facts.file)

    @property
    def routed(self) -> ort.InferenceSession:
        """The graph that weighs the frozen bank."""
        if self._routed_graph is None:
            assert self._routed_file is not None, "the session asks for it only where there is one"
            self._routed_graph = self._load(self._routed_file)
        return self._routed_graph


def name_provider(word: str) -> str:
    """An execution provider by its short name: cuda is CUDAExecutionProvider, cpu CPUExecutionProvider."""
    known = {name.removesuffix(SUFFIX).lower(): name for name in ort.get_all_providers()}
    return known.get(word.lower(), word)


def require_providers(asked: tuple[str, ...]) -> list[str]:
    """The execution providers that were asked for by name, short or whole, all of them.

    Raises:
        LimeEdgeError: one that this build of ONNX Runtime has not; the hint names the package that brings it.
    """
    available, names = ort.get_available_providers(), [name_provider(word) for word in asked]
    for name in names:
        if name not in available:
            short = [one.removesuffix(SUFFIX).lower() for one in available]
            meant = suggest(name.removesuffix(SUFFIX).lower(), short) or "lime-edge doctor lists what is here"
            raise LimeEdgeError(
                f"execution provider {name} is not available: this onnxruntime has {', '.join(short)}",
                f"take {PACKAGES[name]}" if name in PACKAGES else meant,
                EXIT_MISSING,
            )
    return names


def choose_providers(wanted: tuple[str, ...]) -> list[str]:
    """The execution providers of a bundle that this build has, in order.

    Raises:
        LimeEdgeError: none of them is there.
    """
    available = ort.get_available_providers()
    chosen = [name for name in wanted if name in available]
    if not chosen:
        raise LimeEdgeError(
            f"none of the execution providers {', '.join(wanted)} is available",
            f"this onnxruntime has {', '.join(available)}",
            EXIT_MISSING,
        )
    return chosen


def plan_providers(bundle: Bundle, options: SessionOptions) -> list[str]:
    """The execution providers that the bundle's graphs are loaded with."""
    if options.providers:
        return require_providers(options.providers)
    return choose_providers(bundle.manifest.facts_of(OnnxFacts).providers)


def choose_operators(providers: list[str]) -> Path | None:
    """The library with operators for the graph's functions, or None where their own nodes are to run.

    The processor has its own, and so has an NVIDIA GPU where they were built (`operators.build_cuda`). Beside any other
    accelerator, which runs the nodes itself, the processor's would only make it wait.
    The environment variable LIME_EDGE_OPERATORS=0 leaves them out.
    """
    if os.environ.get(OPERATORS, "").lower() in ("0", "false", "off", "no"):
        return None
    if providers[0] == CUDA:
        return find_cuda_library()
    return find_library() if providers == ["CPUExecutionProvider"] else None


def load_graph(bundle: Bundle, name: str, options: SessionOptions) -> ort.InferenceSession:
    """Load one of the bundle's graphs with the threads and execution providers that are meant.

    Args:
        name: path inside the bundle.
    Raises:
        LimeEdgeError: no execution provider, or ONNX Runtime refuses the file.
    """
    facts, settings = bundle.manifest.facts_of(OnnxFacts), ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(RECORD, "1")  # what list_placement tells
    if threads := options.threads or facts.threads:
        settings.intra_op_num_threads = threads
    providers = plan_providers(bundle, options)
    if library := choose_operators(providers):
        settings.register_custom_ops_library(str(library))
    file = bundle.path / name
    chosen = [(name, CUDA_OPTIONS) if name == CUDA else name for name in providers]
    try:
        return ort.InferenceSession(str(file), settings, providers=chosen)
    except Exception as error:  # onnxruntime's exceptions share no public base
        first = str(error).splitlines()[0]
        hint = "lime-edge inspect BUNDLE --verify compares the hashes"
        raise LimeEdgeError(f"{file}: ONNX Runtime cannot load it: {first}", hint) from None


def list_placement(graph: ort.InferenceSession) -> Placement:
    """The nodes of a loaded graph, as ONNX Runtime rewrote it: execution provider -> type of node -> how many."""
    found: dict[str, Counter[str]] = {}
    for part in graph.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return {name: dict(counts.most_common()) for name, counts in found.items()}
