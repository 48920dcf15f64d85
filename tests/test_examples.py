"""The examples run as a person runs them, on any computer; the phones' recipe is the one in their README."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import Make

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMOS = ("raspberry_pi", "jetson")
LINE = r"{name} +switch +[\d.]+ us +first token +[\d.]+ ms +[\d.]+ tokens/s.*'"


@pytest.fixture
def bundle(tiny_bundle: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(quant="int4"), tmp_path / "tiny.lime"))


def run_demo(device: str, *words: object) -> subprocess.CompletedProcess[str]:
    script = EXAMPLES / device / "demo.py"
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize("device", DEMOS)
def test_every_expert_answers_and_a_new_one_is_installed(device: str, bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    vector = np.random.default_rng(0).normal(1, 0.5, manifest.sites.total).astype(np.float16)
    new = Expert("delivered", vector, manifest.adapter_id)
    (tmp_path / "new.safetensors").write_bytes(new.to_bytes())
    done = run_demo(
        device, bundle, "--prompt", "hi", "--tokens", 8, "--threads", 1, "--install", tmp_path / "new.safetensors"
    )
    assert done.returncode == 0, done.stderr
    assert "provider     CPUExecutionProvider" in done.stdout
    answers = {}
    for name in (*manifest.experts, "delivered"):
        found = re.search(LINE.format(name=name), done.stdout)
        assert found, f"no line for {name} in:\n{done.stdout}"
        answers[name] = found[0].split("tokens/s", 1)[1]
    assert len(set(answers.values())) > 1, "experts answer differently"
    assert "installed delivered" in done.stdout and "more switches: median" in done.stdout
    assert Bundle.open(bundle, verify=True).manifest.experts == manifest.experts, "nothing is written"


@pytest.mark.parametrize("device", DEMOS)
def test_chosen_experts_answer_as_a_session_does(device: str, bundle: Path) -> None:
    session = lime_edge.open_decoder(bundle, threads=1)
    name = session.experts[2]
    session.use(name)
    expected = "".join(session.generate("hello", max_new_tokens=8)).strip()
    done = run_demo(device, bundle, "--prompt", "hello", "--raw", "--tokens", 8, "--threads", 1, "--experts", name)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if " switch " in line and "tokens/s" in line]
    assert line.startswith(name) and line.endswith(repr(expected))


@pytest.mark.parametrize("device", DEMOS)
def test_bench_prints_one_json_document(device: str, bundle: Path) -> None:
    done = run_demo(device, bundle, "--bench", "--tokens", 4, "--prompt-tokens", 8, "--threads", 1)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["expert"] == Bundle.open(bundle).manifest.experts[0] and facts["provider"] == "CPUExecutionProvider"
    assert facts["decode_tokens_per_s"] > 0 and facts["switch_us"]["p50"] > 0
    assert facts["board"]["board"]


@pytest.mark.parametrize("device", DEMOS)
def test_faults_are_one_message(device: str, bundle: Path) -> None:
    for words, message in (
        ((bundle.parent / "nothing.lime",), "no such bundle"),
        ((bundle, "--experts", "nobody"), "unknown expert 'nobody'"),
        ((bundle, "--install", bundle / "lime.json"), "not a readable expert file"),
    ):
        done = run_demo(device, *words)
        assert done.returncode == 2 and message in done.stderr, done
        assert "Traceback" not in done.stderr


def test_a_provider_that_is_not_there_is_named(bundle: Path) -> None:
    done = run_demo("jetson", bundle, "--providers", "NoSuchExecutionProvider")
    assert done.returncode == 4 and "this onnxruntime has" in done.stderr


# sensors, from files as the kernel writes them


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def load_demo(device: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / device / "demo.py"))


def test_raspberry_pi_sensors(tmp_path: Path) -> None:
    describe = load_demo("raspberry_pi")["describe_board"]
    unknown = describe(tmp_path)
    assert {"board", "temperature", "governor", "clock", "power"} == set(unknown)
    assert unknown["temperature"] == f"unknown ({tmp_path}/sys/class/thermal/thermal_zone0/temp)"
    write_files(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "sys/class/thermal/thermal_zone0/temp": "48250\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
        },
    )
    known = describe(tmp_path)
    assert known["board"] == "Raspberry Pi 5 Model B Rev 1.0" and known["temperature"] == "48.2 C"
    assert known["governor"] == "ondemand" and known["clock"] == "2400 MHz"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("throttled=0x0", "good"),
        ("throttled=0x50000", "under-voltage earlier, throttled earlier"),
        ("throttled=0x50005", "under-voltage, throttled, under-voltage earlier, throttled earlier"),
        ("VCHI initialization failed", "unknown (vcgencmd: VCHI initialization failed)"),
    ],
)
def test_raspberry_pi_throttling(reply: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "vcgencmd"
    tool.write_text(f"#!/bin/sh\necho '{reply}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert load_demo("raspberry_pi")["read_throttling"]() == words


def test_jetson_sensors(tmp_path: Path) -> None:
    demo = load_demo("jetson")
    assert demo["read_power"](tmp_path) == {} and demo["read_temperatures"](tmp_path) == {}
    assert demo["describe_board"](tmp_path)["power"] == f"unknown (no ina3221 in {tmp_path}/sys/class/hwmon)"
    sensor, zone = "sys/class/hwmon/hwmon3/", "sys/class/thermal/thermal_zone1/"
    write_files(
        tmp_path,
        {
            "sys/class/hwmon/hwmon0/name": "pwmfan\n",
            f"{sensor}name": "ina3221\n",
            f"{sensor}in1_label": "VDD_IN\n",
            f"{sensor}in1_input": "5000\n",
            f"{sensor}curr1_input": "1500\n",
            f"{sensor}in2_label": "VDD_CPU_GPU_CV\n",
            f"{sensor}in2_input": "5008\n",
            f"{zone}type": "gpu-thermal\n",
            f"{zone}temp": "51500\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
        },
    )
    assert demo["read_power"](tmp_path) == {"VDD_IN": 7.5}
    facts = demo["describe_board"](tmp_path)
    assert facts["power"] == "VDD_IN 7.50 W" and facts["temperature"] == "gpu-thermal 51.5 C"
    assert facts["gpu clock"] == "612 MHz"


# phones: android/README.md and ios/README.md say in Kotlin and Swift what this says in numpy


def read_vector(file: Path, tensor: str) -> np.ndarray:
    """One vector of a safetensors file, by hand."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    facts = json.loads(data[8 : 8 + length])[tensor]
    start, end = facts["data_offsets"]
    kind = {"F16": "<f2", "F32": "<f4"}[facts["dtype"]]
    return np.frombuffer(data[8 + length + start : 8 + length + end], kind).astype(np.float32)


@pytest.mark.parametrize("shared", [False, True], ids=["caches that grow", "one buffer"])
def test_the_phones_recipe(shared: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")  # as the recipe runs: int8 activations amplify the difference
    body = json.loads((bundle / "lime.json").read_text())
    model, files = body["backbone"] | body["decoder"], {entry["name"]: entry["file"] for entry in body["experts"]}
    engine = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    reference = read_vector(bundle / "reference.safetensors", "reference")
    session, prompt, count = lime_edge.open_decoder(bundle, threads=1, max_length=32), [5, 17, 200, 31], 6
    for name in session.experts:
        d = read_vector(bundle / files[name], "expert") - reference
        rows = follow_recipe(engine, model, d, prompt, count, shared)
        session.use(name)
        wanted = [session.logits(prompt, keep=1)[-1].copy()]
        for _ in range(count - 1):
            wanted.append(session.extend([int(wanted[-1].argmax())])[-1].copy())
        np.testing.assert_allclose(np.stack(rows), np.stack(wanted), atol=1e-4, rtol=1e-4, err_msg=name)


def follow_recipe(
    engine: onnxruntime.InferenceSession,
    model: dict[str, Any],
    d: np.ndarray,
    prompt: list[int],
    count: int,
    shared: bool,
) -> list[np.ndarray]:
    """Logits of `count` greedy steps."""
    shape = (1, model["kv_heads"], 32 if shared else 0, model["head_dim"])
    names = [f"{layer}.{kind}" for layer in range(model["layers"]) for kind in ("key", "value")]
    cache = {f"past_key_values.{name}": np.zeros(shape, np.float32) for name in names}
    ids, past, rows = np.array([prompt]), 0, []
    for _ in range(count):
        total = past + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "expert": d[None],
            "logits_to_keep": np.array([1]),
        } | cache
        if shared:
            binding = engine.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
            logits = np.empty((1, 1, model["vocab"]), np.float32)
            binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
            for name in names:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(cache[f"past_key_values.{name}"])
                binding.bind_ortvalue_output(f"present.{name}", value)
            engine.run_with_iobinding(binding)
        else:
            logits, *present = engine.run(["logits", *(f"present.{name}" for name in names)], inputs)
            cache = {f"past_key_values.{name}": value for name, value in zip(names, present, strict=True)}
        rows.append(logits[0, -1])
        ids, past = np.array([[int(rows[-1].argmax())]]), total
    return rows
