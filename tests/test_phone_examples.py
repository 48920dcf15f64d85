"""What examples/android/README.md relies on: its recipe on every expert; the app: test_examples.py."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
from conftest import Make
from test_examples import follow_recipe, read_vector

import lime_edge


def test_the_graph_has_no_optional_inputs(tiny_bundle: Make) -> None:
    """Java's API refuses them; all the others have to give what is asked for."""
    bundle = tiny_bundle(quant="int4")
    engine = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    body = json.loads((bundle / "lime.json").read_text())
    model, files = body["backbone"] | body["decoder"], {entry["name"]: entry["file"] for entry in body["experts"]}
    named = {value.name for value in engine.get_inputs()}
    assert {"input_ids", "attention_mask", "expert", "logits_to_keep"} <= named
    assert not engine.get_overridable_initializers()
    session, prompt = lime_edge.open_decoder(bundle, threads=1), [5, 17, 200, 31]
    reference = read_vector(bundle / "reference.safetensors", "reference")
    for name in session.experts:
        session.use(name)
        d = read_vector(bundle / files[name], "expert") - reference
        (row,) = follow_recipe(engine, model, d, prompt, 1, shared=True)
        np.testing.assert_allclose(row, session.logits(prompt, keep=1)[-1], atol=1e-4, rtol=1e-4, err_msg=name)
