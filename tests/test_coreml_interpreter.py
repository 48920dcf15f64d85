"""The reader and the interpreter of saved ML programs: against coremltools' own reading and arithmetic, and mutated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Make
from manifests import reseal
from models import CASES, draw_ids
from oracles import QUANTS
from test_coreml_export import EXACT, NATIVE, build, make_oracle, measure, open_on, residual_of
from test_onnx_export import compile_again
from test_variants import ROUTINGS, make_prompt_adapter

from lime_edge.compiler.formats.adapter_checks import name_selection
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.graph import ct, mb
from lime_edge.runtimes.coreml.interpreter import Interpreter
from lime_edge.runtimes.coreml.operations import OPERATIONS, dequantize
from lime_edge.runtimes.coreml.program import MODEL, WEIGHTS, Constant, Operation, Package, read_package

Sample = tuple[dict[str, Any], list[Any]]
# what coremltools infers no value for, or one output of several, from torch
IN_TORCH: dict[str, Callable[..., Any]] = {
    "split": lambda x, axis, num_splits=None, split_sizes=None: x.split(
        [int(n) for n in split_sizes] if num_splits is None else int(x.shape[axis] // num_splits), int(axis)
    ),
    "silu": lambda x: F.silu(x),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(tuple(axes), bool(keep_dims)),
    "layer_norm": lambda x, axes, gamma, beta, epsilon: F.layer_norm(x, gamma.shape, gamma, beta, float(epsilon)),
    "conv": lambda x, weight, strides, bias, **_: F.conv2d(x, weight, bias, tuple(strides)),
    "gelu": lambda x, mode: F.gelu(x, approximate="none" if mode == "EXACT" else "tanh"),
}


@pytest.fixture(scope="module")
def package(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> Path:
    """A small quantized package that the export's tests make too."""
    model, adapter = build(CASES["llama-tied"], tiny_model, tiny_adapter)
    return tiny_bundle(model, adapter, targets=("coreml",), **QUANTS["int4"])


# reading


def test_the_reader_reads_what_coremltools_reads(package: Path) -> None:
    """Every operation, binding, type, enumerated shape and word of metadata."""
    path = package / "coreml/model.mlpackage"
    spec, found = ct.utils.load_spec(str(path)), read_package(path)
    assert set(found.functions) == set(spec.mlProgram.functions) and len(found.functions["main"].operations) > 100
    for name, function in spec.mlProgram.functions.items():
        block, ours = function.block_specializations[function.opset], found.functions[name]
        assert ours.outputs == list(block.outputs) and list(ours.inputs) == [i.name for i in function.inputs]
        assert len(ours.operations) == len(block.operations)
        for mine, theirs in zip(ours.operations, block.operations, strict=True):
            assert mine.kind == theirs.type
            assert {k: [b if isinstance(b, str) else None for b in v] for k, v in mine.inputs.items()} == {
                k: [b.name or None for b in v.arguments] for k, v in theirs.inputs.items()
            }
            assert [o for o, _ in mine.outputs] == [o.name for o in theirs.outputs]
            for (_, kind), output in zip(mine.outputs, theirs.outputs, strict=True):
                sizes = [d.constant.size if d.HasField("constant") else None for d in output.type.tensorType.dimensions]
                assert list(kind.shape) == sizes
    meta = spec.description.metadata
    assert found.metadata == {
        "description": meta.shortDescription,
        "version": meta.versionString,
        "author": meta.author,
        "license": meta.license,
        **meta.userDefined,
    }
    shapes = spec.description.input[0].type.multiArrayType.enumeratedShapes.shapes
    assert found.functions["main"].shapes == {"input_ids": {tuple(s.shape) for s in shapes}}


def test_the_reader_reads_the_weights_that_coremltools_reads(package: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader

    path, seen = package / "coreml/model.mlpackage", 0
    spec, storage = ct.utils.load_spec(str(path)), _BlobStorageReader(str(path / WEIGHTS))
    read = {
        10: lambda o: np.array(storage.read_fp16_data(o), np.uint16).view(np.float16),
        11: storage.read_float_data,
        21: storage.read_int8_data,
        23: storage.read_int32_data,
        25: storage.read_int4_data,
    }
    main = spec.mlProgram.functions["main"]
    theirs = {op.outputs[0].name: op for op in main.block_specializations[main.opset].operations if op.outputs}
    for op in (op for op in read_package(path).functions["main"].operations if op.outputs):
        values = {"val": op.value} if op.value else {k: v[0] for k, v in op.inputs.items()}
        for key, value in values.items():
            other = theirs[op.outputs[0][0]]
            wanted = other.attributes["val"] if op.value else (other.inputs[key].arguments or [None])[0]
            stored = wanted if op.value else getattr(wanted, "value", None)
            if stored is None or not stored.HasField("blobFileValue") or not isinstance(value, Constant):
                continue
            raw = np.asarray(read[stored.type.tensorType.dataType](stored.blobFileValue.offset)).reshape(-1)
            assert np.array_equal(value.array.reshape(-1), raw), op.outputs[0][0]
            seen += 1
    assert seen > 30


# arithmetic


def collect(
    interpreters: list[Interpreter], inputs: list[dict[str, np.ndarray]], most: int = 4
) -> dict[str, list[Sample]]:
    """What operations of each kind were given and gave, a few of each."""
    seen: dict[str, list[Sample]] = {}

    def note(operation: Operation, given: dict[str, Any], found: list[Any]) -> None:
        samples = seen.setdefault(operation.kind, [])
        sizes = [np.shape(given.get("x", 0)) for given, _ in samples]
        if len(samples) < most and (np.shape(given.get("x", 0)) not in sizes or len(samples) < 2):
            samples.append(({k: v for k, v in given.items()}, [np.copy(value) for value in found]))

    for interpreter, given in zip(interpreters, inputs, strict=True):
        interpreter.observe = note
        interpreter.run(given, interpreter.make_state())
    return seen


def ask_coremltools(kind: str, inputs: dict[str, Any]) -> list[np.ndarray] | None:
    """coremltools' own value of an operation on constants; None where it computes none."""
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=ct.target.iOS18):
        given = {
            key: value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
            for key, value in inputs.items()
        }
        given |= {key: [mb.const(val=v) for v in value] for key, value in given.items() if isinstance(value, list)}
        found = getattr(mb, kind)(**given)
        values = [var.val for var in (found if isinstance(found, (list, tuple)) else [found])]
    return None if any(value is None for value in values) else values


def as_torch(value: Any) -> Any:
    """Float arrays as tensors, everything else as it is."""
    is_float = isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim > 0
    return torch.from_numpy(np.ascontiguousarray(value)) if is_float else value


def check_arithmetic(seen: dict[str, list[Sample]], needed: set[str]) -> None:
    """Every operation that ran, against coremltools' value inference, or torch's where it infers none."""
    assert needed <= set(seen), f"did not run: {sorted(needed - set(seen))}"
    for kind, samples in seen.items():
        for inputs, found in samples:
            wanted = None if kind in IN_TORCH else ask_coremltools(kind, inputs)
            if wanted is None:
                given = IN_TORCH[kind](**{key: as_torch(value) for key, value in inputs.items()})
                wanted = [np.asarray(one) for one in ([given] if isinstance(given, torch.Tensor) else given)]
            for mine, theirs in zip(found, wanted, strict=True):
                theirs = np.asarray(theirs)
                assert mine.shape == theirs.shape, f"{kind}: {mine.shape}, coremltools {theirs.shape}"
                np.testing.assert_allclose(mine, theirs, atol=2e-6, rtol=1e-3 if kind == "cast" else 1e-5, err_msg=kind)


def feed(package: Package, function: str, total: int, length: int = 32) -> dict[str, np.ndarray]:
    """Inputs of a decoder: `length` rows, three of them padding."""
    ids = draw_ids(length, seed=length).numpy().astype(np.int32)
    inputs = {"input_ids": ids, "position": np.array([5], np.int32), "length": np.array([max(1, length - 3)], np.int32)}
    if "expert" in package.functions[function].inputs:
        inputs["expert"] = np.random.default_rng(0).normal(0, 0.5, total).astype(np.float16)
    return inputs


def test_every_operation_equals_coremltools(
    package: Path, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    """On what the programs really compute: pinned, routed in several ways, prompt tuning."""
    model = tiny_model("qwen2")
    paths = [package]
    for variant, routing in (("lora", "soft"), ("dora", "sparse-auto"), ("slicefine", "windows"), ("lora_fa", "auto")):
        adapter = tiny_adapter(model, rank=6, experts=5, shared=True, variant=variant, routing=ROUTINGS[routing])
        paths.append(tiny_bundle(model, adapter, targets=("coreml",)))
    prompt = make_prompt_adapter(
        tmp_path / "adapter",
        tiny_model("llama"),
        input_conditioned=True,
        input_conditioning_mode="attention",
        sparse_mode=False,
        **ROUTINGS["auto"],
        routing=name_selection(RoutingConfig(**ROUTINGS["auto"])),
    )
    paths.append(tiny_bundle(tiny_model("llama"), prompt, targets=("coreml",)))
    interpreters, inputs = [], []
    for path in paths:
        held = read_package(path / "coreml/model.mlpackage")
        for name, function in held.functions.items():
            interpreters.append(Interpreter(held, name))
            total = function.inputs["expert"].shape[0] if "expert" in function.inputs else 0
            inputs.append(feed(held, name, total or 0))
    check_arithmetic(
        collect(interpreters, inputs),
        {
            "linear",
            "matmul",
            "gather",
            "softmax",
            "silu",
            "reduce_mean",
            "rsqrt",
            "cumsum",
            "split",
            "concat",
            "reshape",
            "transpose",
            "slice_by_index",
            "topk",
            "scatter_along_axis",
            "sigmoid",
            "select",
            "floor_div",
            "cast",
        },
    )


@pytest.mark.parametrize("bits,shape,scales", [(4, (6, 64), (6, 2)), (8, (5, 24), (5, 1)), (4, (4, 32), (1, 1))])
def test_quantized_constants_equal_coremltools(bits: int, shape: tuple[int, int], scales: tuple[int, int]) -> None:
    from coremltools.converters.mil.mil import Function

    from lime_edge.exporters.coreml.graph import INT4

    random = np.random.default_rng(bits)
    data = random.integers(-(1 << bits - 1), 1 << bits - 1, shape).astype(INT4 if bits == 4 else np.int8)
    scale = random.uniform(0.01, 0.1, scales).astype(np.float32)
    with Function({}, opset_version=ct.target.iOS18):
        wanted = mb.constexpr_blockwise_shift_scale(data=data, scale=scale).op.materialized_val_inference()
    assert np.array_equal(dequantize(data.astype(np.int8), scale), wanted)
    offset = np.full(scales, 3, np.int8)
    assert np.array_equal(dequantize(data.astype(np.int8), scale, offset), dequantize(data.astype(np.int16) - 3, scale))


# mutations: whatever is changed in the file must show


MUTATED = "mutated.lime"


def mutated(package: Path, directory: Path) -> Path:
    return Path(shutil.copytree(package, directory / MUTATED))


def ask(path: Path, selection: str = "expert1") -> np.ndarray:
    if path.name == MUTATED:
        reseal(path)
    session = open_on(path, EXACT)
    session.use(selection)
    return session.logits(draw_ids(20, seed=4)[0].tolist())


@pytest.fixture(scope="module")
def oracle(tiny_model: Make, tiny_adapter: Make) -> DecoderModule:
    return make_oracle(compile_again(*build(CASES["llama-tied"], tiny_model, tiny_adapter), **QUANTS["int4"]))


def judge(path: Path, oracle: DecoderModule, selection: str = "expert1") -> float:
    """The error; the manifest of a mutated package is made to fit, so that only the numbers can tell."""
    if path.name == MUTATED:
        reseal(path)
    session = open_on(path, EXACT)
    session.use(selection)
    ids = draw_ids(20, seed=4)
    return measure(session.logits(ids[0].tolist()), oracle(ids, residual_of(session, selection))[0].numpy())


def find_blobs(package: Path) -> dict[str, int]:
    """Where in the weight file the data of each constant begins, by its output's name and parameter."""
    spec = ct.utils.load_spec(str(package / "coreml/model.mlpackage"))
    main, raw = spec.mlProgram.functions["main"], (package / "coreml/model.mlpackage" / WEIGHTS).read_bytes()
    places = {}
    for op in main.block_specializations[main.opset].operations:
        values = (
            {"val": op.attributes["val"]}
            if op.type == "const"
            else {key: argument.arguments[0].value for key, argument in op.inputs.items() if argument.arguments}
        )
        for key, value in values.items():
            if value.HasField("blobFileValue"):
                offset = value.blobFileValue.offset
                places[f"{op.outputs[0].name}.{key}"] = int.from_bytes(raw[offset + 16 : offset + 24], "little")
    return places


def test_one_flipped_byte_of_any_matrix_shows(package: Path, oracle: DecoderModule, tmp_path: Path) -> None:
    assert judge(package, oracle) < 1e-4
    places = find_blobs(package)
    chosen = [name for name in places if name.endswith((".data", ".scale")) or "_lime_" in name or "norm" in name]
    assert len(chosen) > 25
    path = mutated(package, tmp_path)
    weights = path / "coreml/model.mlpackage" / WEIGHTS
    original, missed = weights.read_bytes(), []
    ids = draw_ids(20, seed=4)[0].tolist()
    for name in chosen:
        row = ids[3] * (64 if ".data" in name else 2) if "embed" in name else 0  # a row that the prompt reads
        flipped = bytearray(original)
        flipped[places[name] + row + 1] ^= 0x50  # a nibble, or exponent and sign of a float16
        weights.write_bytes(bytes(flipped))
        error = judge(path, oracle)
        if error <= 1e-4:  # NaN is noticed too
            missed.append(f"{name}: {error:.3g}")
    assert not missed, missed


def test_a_swapped_expert_slice_shows(package: Path, oracle: DecoderModule, tmp_path: Path) -> None:
    """Two layers read each other's piece of the expert."""

    def swap(operations: Any) -> None:
        cuts = [op for op in operations if op.type == "slice_by_index" and op.inputs["x"].arguments[0].name == "expert"]
        pairs = [(a, b) for a in cuts for b in cuts if a.outputs[0].type == b.outputs[0].type and a is not b]
        first, second = pairs[0]
        for key in ("begin", "end"):
            one, two = first.inputs[key].arguments[0], second.inputs[key].arguments[0]
            one.name, two.name = two.name, one.name

    assert rewrite(package, tmp_path, swap, oracle) > 1e-3


CHANGES: dict[str, tuple[str, str]] = {
    "gate": ("silu", "tanh"),
    "norm": ("rsqrt", "sqrt"),
    "weight": ("mul", "add"),
    "rotation": ("sub", "add"),
    "peak": ("reduce_max", "reduce_min"),
    "mean": ("reduce_mean", "reduce_sum"),
    "stream": ("add", "sub"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_operation_shows(what: str, package: Path, oracle: DecoderModule, tmp_path: Path) -> None:
    """The last one of its kind: what is left after it is least."""
    kind, other = CHANGES[what]

    def change(operations: Any) -> None:
        named = [op for op in operations if what == "stream" and op.outputs and op.outputs[0].name.endswith("_output")]
        chosen = (named or [op for op in operations if op.type == kind])[-1]
        chosen.type = other
        if "epsilon" in chosen.inputs and other != "rsqrt":
            del chosen.inputs["epsilon"]

    error = rewrite(package, tmp_path, change, oracle)
    if what == "peak":  # another divisor: the norm is the same as long as nothing overflows
        assert error < 1e-3
    else:
        assert error > 1e-3, f"{kind} to {other}: error {error:.3g}"


def test_a_cache_that_is_not_written_shows(package: Path, oracle: DecoderModule, tmp_path: Path) -> None:
    def drop(operations: Any) -> None:
        place = next(i for i, op in enumerate(operations) if op.type == "write_state")
        del operations[place]

    assert rewrite(package, tmp_path, drop, oracle) > 1e-2


def rewrite(package: Path, directory: Path, change: Callable[[Any], None], oracle: DecoderModule) -> float:
    """The error after a change to the program."""
    path = mutated(package, directory)
    file = path / "coreml/model.mlpackage" / MODEL
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    main = spec.mlProgram.functions["main"]
    change(main.block_specializations[main.opset].operations)
    file.write_bytes(spec.SerializeToString())
    return judge(path, oracle)


# refusals


def test_wrong_inputs_and_files_are_refused(package: Path, tmp_path: Path) -> None:
    held = read_package(package / "coreml/model.mlpackage")
    interpreter = Interpreter(held)
    inputs = feed(held, "main", held.functions["main"].inputs["expert"].shape[0] or 0)
    with pytest.raises(LimeEdgeError, match=r"'input_ids': expected \(1, 1\) or \(1, 32\), found \(1, 7\)"):
        interpreter.run(inputs | {"input_ids": inputs["input_ids"][:, :7]}, interpreter.make_state())
    with pytest.raises(LimeEdgeError, match="input 'length' is missing"):
        interpreter.run({k: v for k, v in inputs.items() if k != "length"}, interpreter.make_state())
    with pytest.raises(LimeEdgeError, match="function 'other': expected one of main"):
        Interpreter(held, "other")
    path = mutated(package, tmp_path) / "coreml/model.mlpackage"
    file = path / MODEL
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(LimeEdgeError, match="model.mlmodel: not a readable ML program: file of .* a message ends too"):
        read_package(path)
    (path / MODEL).unlink()
    with pytest.raises(LimeEdgeError, match="not a readable .mlpackage"):
        read_package(path)


@pytest.mark.parametrize(
    "content,what",
    [
        (b"\x08\x09", "file of 2 bytes: field 2 is missing"),
        (b"garbage", "file of 7 bytes: wire type 7"),
        (b"\x10\x01", "file of 2 bytes: a field of another type than expected"),
        (b"", "file of 0 bytes: field 2 is"),
        (b"\xff" * 40, "file of 40 bytes: a number of more than ten bytes"),
    ],
)
def test_a_program_that_is_none(content: bytes, what: str, package: Path, tmp_path: Path) -> None:
    path = mutated(package, tmp_path) / "coreml/model.mlpackage"
    (path / MODEL).write_bytes(content)
    with pytest.raises(LimeEdgeError, match=f"model.mlmodel: not a readable ML program: {what}") as caught:
        read_package(path)
    assert "lime-edge inspect BUNDLE --verify" in caught.value.hint


def test_noise_in_the_program_is_told(package: Path, tmp_path: Path) -> None:
    """Whatever a byte becomes, the reader answers or says what it cannot read."""
    path = mutated(package, tmp_path) / "coreml/model.mlpackage"
    whole, noise, refused = (path / MODEL).read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        changed = bytearray(whole)
        for place in noise.integers(0, len(whole), 8):
            changed[place] = noise.integers(0, 256)
        (path / MODEL).write_bytes(changed)
        try:
            read_package(path)
        except LimeEdgeError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("kept", [0, 70, -1])
def test_a_truncated_weight_file_is_told(kept: int, package: Path, tmp_path: Path) -> None:
    """The file, what it should hold at least, and its length; empty, within a description, within values."""
    path = mutated(package, tmp_path) / "coreml/model.mlpackage"
    whole = (path / WEIGHTS).read_bytes()
    size = kept if kept >= 0 else len(whole) // 2
    (path / WEIGHTS).write_bytes(whole[:size])
    with pytest.raises(LimeEdgeError, match=rf"weight.bin: expected at least \d+ bytes, found {size}\n") as caught:
        read_package(path)
    assert int(caught.value.problem.split("at least ")[1].split()[0]) > size
    assert "lime-edge inspect BUNDLE --verify" in caught.value.hint


def test_what_is_not_known_is_named(package: Path, tmp_path: Path) -> None:
    path = mutated(package, tmp_path) / "coreml/model.mlpackage"
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    main = spec.mlProgram.functions["main"]
    next(op for op in main.block_specializations[main.opset].operations if op.type == "silu").type = "gru"
    (path / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(LimeEdgeError, match="the interpreter does not know gru"):
        Interpreter(read_package(path))


def test_native_mode_rounds_and_exact_mode_does_not(package: Path) -> None:
    for provider, rounded in ((EXACT, False), (NATIVE, True)):
        session = open_on(package, provider)
        logits = session.logits(draw_ids(9)[0].tolist())
        assert np.array_equal(logits, logits.astype(np.float16).astype(np.float32)) == rounded, provider
    assert set(OPERATIONS) > {"linear", "constexpr_blockwise_shift_scale"}
