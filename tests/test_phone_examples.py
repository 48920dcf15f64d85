"""The workstation's step of examples/android/README.md, run as it is written there; the app's: test_examples.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import Make
from test_examples import EXAMPLES, follow_recipe, read_vector

import lime_edge


def test_the_android_graph_has_no_optional_inputs(
    tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(quant="int4"), tmp_path / "smollm2.lime"))
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (EXAMPLES / "android" / "README.md").read_text(), re.S)
    exec(compile(snippet, "android/README.md", "exec"), {})
    engine = onnxruntime.InferenceSession(bundle / "onnx/model-android.onnx", providers=["CPUExecutionProvider"])
    model = json.loads((bundle / "lime.json").read_text())["model"]
    named = {value.name for value in engine.get_inputs()}
    assert {"input_ids", "attention_mask", "expert", "logits_to_keep"} <= named
    assert not engine.get_overridable_initializers()
    session, prompt = lime_edge.open_decoder(bundle, threads=1), [5, 17, 200, 31]
    reference = read_vector(bundle / "reference.safetensors", "reference")
    for name in session.experts:
        session.use(name)
        d = read_vector(bundle / f"experts/{name}.safetensors", "expert") - reference
        (row,) = follow_recipe(engine, model, d, prompt, 1, shared=True)
        np.testing.assert_allclose(row, session.logits(prompt, keep=1)[-1], atol=1e-4, rtol=1e-4, err_msg=name)
