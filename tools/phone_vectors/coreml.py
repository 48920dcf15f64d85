"""What runtimes/coreml feeds a package, call by call, and the interpreter's answers: for readers without Core ML."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from models import make_adapter, make_model  # noqa: E402
from test_variants import make_prompt_adapter  # noqa: E402

import lime_edge  # noqa: E402
from lime_edge.bundle.experts import parse_selection  # noqa: E402
from lime_edge.compiler.options import CompileOptions  # noqa: E402
from lime_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from lime_edge.runtimes.coreml.decoder import InterpretedModel  # noqa: E402
from lime_edge.session.decoder import Session  # noqa: E402
from lime_edge.session.generate import GenerationOptions  # noqa: E402
from lime_edge.targets.devices import find_device  # noqa: E402
from lime_edge.targets.entries import CoremlOptions  # noqa: E402

LENGTHS, CACHE = (4, 16), 32
BLEND = "expert0=0.75,expert2=0.25"
# name -> (adapter options, selections)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "coreml": ({}, ("expert0", "expert3", BLEND, "none")),
    "coreml-soft": ({"routing": {"top_k": 2}}, ("expert1", "routed", "expert2")),
    "coreml-activated": ({"activation": {"kind": "generation_prompt", "tokens": 5}}, ("expert0", "expert1")),
}
PROMPTS = (1, 4, 5, 9, 16, 22)  # shorter than a length, equal, between two, longer than the longest


class Recorder:
    """Stands in for a loaded package and notes what it is given and gives."""

    def __init__(self, model: Any):
        self._model, self.calls = model, list[dict[str, Any]]()

    def run(self, function: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        outputs = self._model.run(function, inputs)
        told = {name: write_array(array) for name, array in inputs.items()}
        given = {name: write_array(np.asarray(array, np.float32)) for name, array in outputs.items()}
        self.calls.append({"function": function, "inputs": told, "outputs": given})
        return outputs


def write_coreml(folder: Path, work: Path) -> dict[str, Any]:
    """Export folder/NAME.lime for every case and record a script of calls on each."""
    model = make_model(work / "llama", "llama")
    found = {}
    for name, (adapter, selections) in CASES.items():
        export(model, make_adapter(work / f"{name}-adapter", model, **adapter), folder / f"{name}.lime")
        found[name] = record(folder / f"{name}.lime", selections)
    virtual = make_prompt_adapter(work / "coreml-prompt", model, input_conditioned=False)
    export(model, virtual, folder / "coreml-prompt.lime")
    found["coreml-prompt"] = record(folder / "coreml-prompt.lime", ("expert0", "expert1"))
    return found


def export(model: Path, adapter: Path, output: Path) -> None:
    """A tiny bundle with the Core ML target alone."""
    shutil.rmtree(output, ignore_errors=True)
    options = CoremlOptions(prompt_lengths=LENGTHS, max_seq_len=CACHE)
    exporting = ExportOptions(("coreml",), target_options={"coreml": options})
    export_bundle(model, adapter, output, CompileOptions(quant="none"), find_device("cpu"), exporting)


def record(path: Path, selections: tuple[str, ...]) -> dict[str, Any]:
    """A script: for each selection prompts of every kind and a generation, all on one session."""
    session: Session = lime_edge.open_decoder(path, target="coreml")
    engine: Any = session._engine
    assert isinstance(engine._model, InterpretedModel)
    recorder = engine._model = Recorder(engine._model)
    random, steps = np.random.default_rng(9), []
    for text in selections:
        session.use(parse_selection(text))
        for count in PROMPTS:
            ids = random.integers(3, session.bundle.manifest.backbone.vocab, count).tolist()
            if text == "routed" and count > LENGTHS[-1]:
                continue
            steps.append({"do": "logits", "selection": text, "ids": ids})
            steps[-1]["logits"] = session.logits(ids, keep=2 if count > 1 else 1).tolist()
        options = GenerationOptions(max_new_tokens=5, ignore_eos=True)
        ids = random.integers(3, session.bundle.manifest.backbone.vocab, 7).tolist()
        steps.append(
            {"do": "generate", "selection": text, "ids": ids, "tokens": list(session.generate_ids(ids, options))}
        )
    return {"steps": steps, "calls": recorder.calls}


def write_array(array: np.ndarray) -> dict[str, Any]:
    """Shape, type and values; of float16 the bits."""
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    return {"shape": list(array.shape), "dtype": str(array.dtype), "values": values.ravel().tolist()}
