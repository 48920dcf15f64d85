"""The Core AI file, run by Apple's interpreter, against the torch oracle; and its integers against the compiler's.

float32 activations prove the program. float16, which is what devices get, is coarse in that interpreter: one tolerance.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make, remember
from families import FAMILY_CASES
from models import ALL_LINEARS, CASES, CONTEXT, draw_ids
from oracles import QUANTS, follow_decoder, read_residual
from test_activated_adapter import GIVEN, reference
from test_onnx_export import (
    BLEND,
    QUANTIZED,
    assert_integers_equal,
    build,
    compile_again,
    stored,
)
from test_variants import ROUTINGS, VARIANTS, make_prompt_adapter

from lime_edge.bundle.bundle import Bundle
from lime_edge.checks.verify import verify_bundle
from lime_edge.cli.target_flags import read_told
from lime_edge.compiler.formats.adapter_checks import name_selection
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.coreai.decoder import write_decoder
from lime_edge.exporters.coreai.entry import check_options
from lime_edge.runtimes.padded import plan_calls
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.open import open_decoder
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import CoreaiFacts, CoreaiOptions

pytestmark = pytest.mark.check
ROOT = Path(__file__).parent.parent
LIMITS = {"float32": 1e-4, "float16": 3e-2}  # of the largest logit, at least of 1
SELECTIONS = (None, "expert1", BLEND)
PROMPT, LENGTH, STEPS = 16, 27, 3  # the one enumerated length besides 1; a full call and a padded one; decode
# every turn of the program once, each with one way of quantizing
DECODERS = {
    "llama-tied": "int4",
    "llama-biases": "all int4",
    "llama-head-dim": "none",
    "llama-one-kv-head": "int8",
    "llama-gelu-tanh": "none",
    "mistral-window-2": "int8",
    "qwen3": "int4",
    "smollm3-sliding": "none",
    "granite": "int8",
    "gemma2": "int4",
    "phi3-longrope": "int8",
    "olmo2": "none",
    "stablelm-parallel": "int4",
    "cohere": "none",
    "arcee": "int8",
}


@pytest.fixture(scope="session")
def core_bundle(shared_folder: Path) -> Make:
    """core_bundle(model, adapter, activations="float32", targets=("coreai",), **options): options of the compiler."""

    def make(
        directory: Path,
        model: Path,
        adapter: Path,
        activations: str = "float32",
        targets: tuple[str, ...] = ("coreai",),
        **options: Any,
    ) -> Path:
        compiling, output = CompileOptions(**({"quant": "none"} | options)), directory.with_suffix(".lime")
        told = CoreaiOptions(prompt_lengths=(PROMPT,), activations=activations)
        wanted = ExportOptions(targets, target_options={"coreai": told})
        export_bundle(Path(model), Path(adapter), output, compiling, find_device("cpu"), wanted)
        return output

    return remember(shared_folder / "coreai", make)


def open_on(path: Path) -> Session:
    return open_decoder(Bundle.open(path), "coreai")


def residual_of(session: Session, selection: Any) -> torch.Tensor | None:
    """d of a selection; None routes."""
    return None if selection == "routed" else read_residual(session, selection)


def check_selection(session: Session, oracle: DecoderModule, selection: Any, what: str) -> np.ndarray:
    """See follow_decoder; a routed prompt in one call, padded, with room for virtual tokens."""
    ids = draw_ids(LENGTH, seed=3)[:, : PROMPT - 5 if selection == "routed" else LENGTH]

    def note(found: np.ndarray, wanted: np.ndarray, fed: str) -> None:
        compare(found, wanted, f"{what}, {fed}")

    return follow_decoder(session, oracle, selection, residual_of(session, selection), ids, STEPS, note)


def compare(found: np.ndarray, wanted: np.ndarray, what: str, activations: str = "float32") -> None:
    assert found.shape == wanted.shape
    error = float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))
    assert error < LIMITS[activations], f"{what}: error {error:.3g}, limit {LIMITS[activations]:g}"


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_the_oracle(name: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """Experts, a blend and none; a prompt, a padded prompt, decode with the cache."""
    model, adapter = build((CASES | FAMILY_CASES)[name], tiny_model, tiny_adapter)
    how = QUANTS[DECODERS[name]]
    session = open_on(core_bundle(str(model), str(adapter), **how))
    oracle = DecoderModule(compile_again(model, adapter, **how))
    seen = [check_selection(session, oracle, selection, name) for selection in SELECTIONS]
    assert min(np.abs(one - two).max() for one, two in zip(seen, seen[1:], strict=False)) > 0.1


@pytest.mark.small
def test_a_small_case_is_verified(tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """Every selection against the golden outputs of PyTorch, routed too; and one engine, two selections, one cache."""
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    adapter = tiny_adapter(model, targets=("q_proj", "v_proj"), routing=ROUTINGS["soft"])
    path = core_bundle(str(model), str(adapter), quant="int4")
    report = verify_bundle(path, ("coreai",))
    assert not report.missed and len(report.checks) == 7, report
    session = open_on(path)
    assert session.provider == "CoreAI-interpreter"
    session.use("expert0")
    one = session.logits(draw_ids(9)[0].tolist())
    session.use("expert1")
    assert np.abs(session.logits(draw_ids(9)[0].tolist()) - one).max() > 0.1
    session.use("expert0")
    assert np.array_equal(session.logits(draw_ids(9)[0].tolist()), one)


@pytest.mark.parametrize("routing", ["soft", "auto", "sparse-1", "sparse-2", "windows"])  # the code is the oracle's
def test_routing_equals_the_oracle(routing: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """Padded, in one call, then token by token; variants take turns."""
    model = tiny_model("qwen2")
    variant = VARIANTS[list(ROUTINGS).index(routing) % len(VARIANTS)]
    adapter = tiny_adapter(
        model,
        rank=6,
        experts=5,
        shared=True,
        variant=variant,
        routing=ROUTINGS[routing],
        targets=("q_proj", "v_proj", "o_proj", "up_proj"),
    )
    session = open_on(core_bundle(str(model), str(adapter)))
    oracle = DecoderModule(compile_again(model, adapter, quant="none"))
    routed = check_selection(session, oracle, "routed", f"{variant}, {routing}")
    pinned = check_selection(session, oracle, "expert3", f"{variant}, {routing}")
    count = len(routed) - STEPS
    assert np.abs(routed[:count] - pinned[:count]).max() > 0.01


@pytest.mark.parametrize("variant", ["lora", "slicefine"])
def test_embedding_sites(variant: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """The table folds, and its branch is looked up; a tied head keeps the old one."""
    model = tiny_model("llama", tie_word_embeddings=True)
    adapter = tiny_adapter(
        model,
        variant=variant,
        routing=ROUTINGS["soft"],
        rank=6,
        shared=True,
        targets=("embed_tokens", "q_proj", "o_proj"),
    )
    session = open_on(core_bundle(str(model), str(adapter), fold="expert1"))
    oracle = DecoderModule(compile_again(model, adapter, quant="none", fold="expert1"))
    for selection in ("routed", "expert0", "expert1"):
        check_selection(session, oracle, selection, variant)


@pytest.mark.parametrize("conditioning", ["static", "mean", "first", "last", "attention"])
def test_prompt_tuning(conditioning: str, tiny_model: Make, tmp_path: Path, core_bundle: Make) -> None:
    model = tiny_model("llama")
    hyper: dict[str, Any] = {"sparse_mode": False} | ROUTINGS["windows" if conditioning == "mean" else "auto"]
    how: dict[str, Any] = {"input_conditioned": conditioning != "static"}
    how |= {"input_conditioning_mode": conditioning} if conditioning != "static" else {}
    name = name_selection(RoutingConfig(**hyper))
    adapter = make_prompt_adapter(tmp_path / "adapter", model, routing=name, **hyper, **how)
    session = open_on(core_bundle(str(model), str(adapter)))
    assert session.max_length == CONTEXT - 5
    oracle, seen = DecoderModule(compile_again(model, adapter, quant="none")), []
    for selection in ("routed", "expert0", {"expert0": 0.5, "expert2": 0.5}):
        seen.append(check_selection(session, oracle, selection, conditioning))
    count = len(seen[0]) - STEPS
    assert min(np.abs(seen[0][:count] - seen[1][:count]).max(), np.abs(seen[1] - seen[2]).max()) > 0.01


@pytest.mark.parametrize("variant", ["lora", "slicefine"])
def test_a_single_expert_has_no_branch(variant: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    model = tiny_model("llama", attention_bias=True)
    adapter = tiny_adapter(model, targets=ALL_LINEARS, variant=variant)
    how: dict[str, Any] = {"fold": "expert1", "single": True, "quant": "int8"}
    path = core_bundle(str(model), str(adapter), **how)
    assert not Bundle.open(path).manifest.targets["coreai"].expert_input
    check_selection(open_on(path), DecoderModule(compile_again(model, adapter, **how)), "expert1", variant)
    assert "expert" not in read_functions(path)["main_1"]


def test_experts_that_act_from_the_header_on(tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """The expert, and where there is routing the function, changes between two calls on one cache."""
    model = tiny_model()
    adapter = tiny_adapter(model, activation=GIVEN, routing=ROUTINGS["soft"])
    session, unfolded = open_on(core_bundle(str(model), str(adapter))), reference(model, adapter)
    for selection, mode in (("expert0", 0), ("routed", "routed")):
        session.use(selection)
        unfolded.use(mode)
        ids = draw_ids(12)
        wanted = unfolded.generate(ids, 4)[0, 12:].tolist()
        assert list(session.generate_ids(ids[0].tolist(), GenerationOptions(4, ignore_eos=True))) == wanted, selection


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_float16_as_shipped(quant: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """Coarse in the interpreter, within one tolerance of the float32 oracle; routed too, where no token tips over."""
    model = tiny_model("qwen3", head_dim=32)
    adapter = tiny_adapter(model, targets=ALL_LINEARS, routing=ROUTINGS["soft"])
    path = core_bundle(str(model), str(adapter), activations="float16", quant=quant)
    facts = Bundle.open(path).manifest.facts_of(CoreaiFacts)
    assert facts.compute == "float16" and facts.report["peak"]["value"] < facts.report["peak"]["limit"]
    session, oracle, ids = open_on(path), DecoderModule(compile_again(model, adapter, quant=quant)), draw_ids(13)
    for selection in (*SELECTIONS, "routed"):
        session.use(selection)
        wanted = oracle(ids, residual_of(session, selection))[0].numpy()
        compare(session.logits(ids[0].tolist()), wanted, f"{quant}, {selection}", "float16")


# the file


FILE = "coreai/model.aimodel"
DTYPES = {"si4": np.uint8, "si8": np.int8, "f32": np.float32, "f16": np.float16}


@dataclass(frozen=True)
class Matrix:
    """Codes (N, K) signed and scales (N, G) float32, as the file has them."""

    kind: str
    codes: np.ndarray
    scales: np.ndarray


def read_functions(bundle: Path) -> dict[str, dict[str, str]]:
    """Inputs and outputs of every function: name and type as Core AI spells it."""
    from coreai.authoring import AIModelAsset

    summary = AIModelAsset.load(bundle / FILE).summary(include_statistics=False)
    assert summary is not None
    return {
        name: dict([*summary.function_inputs(name), *summary.function_outputs(name)]) for name in summary.function_names
    }


def read_text(bundle: Path) -> str:
    """The program as Core AI's compiler prints it, constants and all."""
    from coreai.authoring import AIProgram

    return str(AIProgram._load_bytecode(bundle / FILE / "main.mlirb")._module._mlir_module)


def cut_functions(text: str) -> dict[str, str]:
    """The text of every function by name."""
    heads = [
        (found.group(1), found.start()) for found in re.finditer(r"^  coreai.graph (?:private .*?)?@(\w+)", text, re.M)
    ]
    ends = [start for _, start in heads[1:]] + [text.index("{-#")]
    return {name: text[start:end] for (name, start), end in zip(heads, ends, strict=True)}


def read_matrices(text: str, function: str) -> list[Matrix]:
    """Every quantized matrix of one function."""
    blobs = dict(re.findall(r'(resource_\d+): "0x([0-9A-F]+)"', text[text.index("{-#") :]))
    body = cut_functions(text)[function]
    constants = re.findall(r"(%\w+) = coreai.constant dense(?:_resource<(\w+)>|<(.*?)>) : tensor<([\dx]+)x(\w+)>", body)
    values = {}
    for name, resource, inline, shape, kind in constants:
        if kind in DTYPES:
            data = bytes.fromhex(blobs[resource][8:]) if resource else inline  # a blob begins with its alignment
            values[name] = kind, unpack(data, tuple(map(int, shape.split("x"))), kind)
    found = []
    for codes, scales in re.findall(r"coreai.blockwise_shift_scale (%\w+), (%\w+),", body):
        (kind, integers), (_, steps) = values[codes], values[scales]
        found.append(Matrix(kind, integers, steps.astype(np.float32)))
    return found


def unpack(data: bytes | str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Constants from bytes, two int4 in a byte, the first low; or as they are printed: bytes, a list, one for all."""
    if isinstance(data, str) and not data.startswith('"0x'):
        numbers = np.array(json.loads(data))
        return np.broadcast_to(numbers.astype(np.int8 if kind[0] == "s" else DTYPES[kind]), shape)
    raw = np.frombuffer(bytes.fromhex(data[3:-1]) if isinstance(data, str) else data, DTYPES[kind])
    if kind == "si4":
        nibbles = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
        raw = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    return raw.reshape(shape)


def stacks_of(compiled: CompiledModel) -> dict[str, list[str]]:
    """Every matrix of the file: the weights that are stacked in it."""
    stacks = [[f"{compiled.decoder.embedding}.weight"], [compiled.head_name]]
    for layer in range(len(compiled.decoder.layers)):
        stacks += [[f"{name}.weight" for name in group.names] for group in compiled.groups(layer).values()]
    return {"+".join(names): names for names in stacks}


@pytest.mark.parametrize(
    ("name", "quant", "activations"),
    [
        ("no-block-divides", "int4", "float16"),
        ("qwen2-tied", "int8", "float32"),
        ("smollm3-sliding", "all int4", "float16"),
    ],
)
def test_the_file_holds_the_integers_of_onnx(
    name: str, quant: str, activations: str, tiny_model: Make, tiny_adapter: Make, core_bundle: Make
) -> None:
    """Bit for bit, scales too, in every function: nothing is rounded anew."""
    model, adapter = build(QUANTIZED[name], tiny_model, tiny_adapter)
    path = core_bundle(str(model), str(adapter), activations=activations, targets=("onnx", "coreai"), **QUANTS[quant])
    compiled, text = compile_again(model, adapter, **QUANTS[quant]), read_text(path)
    assert_integers_equal(path, compiled, f"{name}, {quant}, onnx")
    for function in ("main_1", f"main_{PROMPT}"):
        matrices = read_matrices(text, function)
        for what, names in stacks_of(compiled).items():
            wanted = [stored(compiled, part) for part in names]
            codes = torch.cat([tensor.codes for tensor in wanted]).numpy()
            scales = torch.cat([tensor.scales for tensor in wanted]).numpy()
            same = [m for m in matrices if m.codes.shape == codes.shape and np.array_equal(m.codes, codes)]
            assert same, f"{function}: no matrix has the codes of {what}"
            assert any(np.array_equal(m.scales, scales) for m in same), f"{function}: other scales at {what}"
            assert same[0].kind == f"si{wanted[0].bits}", what
        assert len(matrices) == len(stacks_of(compiled)), function
    targets = Bundle.open(path).manifest.targets
    assert targets["onnx"].weight_hash == targets["coreai"].weight_hash == compiled.weight_hash()


def test_functions_inputs_and_facts(tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """Every shape is fixed; the weights are stored once for all functions; the manifest has the reported faults."""
    model = tiny_model("llama")
    routed, plain = (tiny_adapter(model, routing=how) for how in (ROUTINGS["auto"], None))
    paths = [core_bundle(str(model), str(one), activations="float16", quant="int8") for one in (routed, plain)]
    manifest = Bundle.open(paths[0]).manifest
    facts, total = manifest.facts_of(CoreaiFacts), manifest.sites.total
    functions = read_functions(paths[0])
    assert set(functions) == {"main_1", "main_16", "routed_1", "routed_16"}
    assert set(read_functions(paths[1])) == {"main_1", "main_16"}
    for name, ports in functions.items():
        kind, _, length = name.partition("_")
        extra = ("expert", f"Float16, {total}") if kind == "main" else ("length", "Int32, 1")
        assert ports == {
            "input_ids": f"NDArray (Int32, 1 × {length})",
            "position": "NDArray (Int32, 1)",
            extra[0]: f"NDArray ({extra[1]})",
            "logits": f"NDArray (Float16, 1 × {length} × {manifest.backbone.vocab})",
        }, name
    text = read_text(paths[0])
    states = re.findall(
        r'handle<tensor<(\w+)>> \{MutableBuffers.buffer_mutation = "(\w+)"', cut_functions(text)["main_1"]
    )
    assert states == [(f"2x1x2x{CONTEXT}x16xf16", name) for name in ("keys", "values")]
    assert facts.lengths == (1, PROMPT) and facts.max_length == CONTEXT and facts.compute == "float16"
    assert (facts.minimum, facts.compute_unit, facts.routed) == ("iOS27", "gpu", "routed")
    assert facts.providers == ("CoreAI", "CoreAI-interpreter")
    files = [entry.size for name, entry in manifest.files.items() if name.startswith("coreai/")]
    assert facts.report["bytes"] == sum(files) and facts.report["seconds"] > 0
    notes = " ".join(facts.report["notes"])
    assert all(f"#{number}" in notes for number in (279, 205, 124))
    codes = stored(compile_again(model, routed, quant="int8"), "lm_head.weight").codes.numpy()
    assert text.count(codes.tobytes().hex().upper()) == 1, "four functions, one head"


# what is refused, and how prompts are cut


def test_what_float16_cannot_hold(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """Refused as Core ML refuses it; float32 takes it."""
    model = tiny_model("llama")
    compiled = compile_again(model, tiny_adapter(model), quant="none")
    loud = dict(compiled.vectors) | {"model.norm.weight": compiled.vectors["model.norm.weight"] * 1e6}
    with pytest.raises(LimeEdgeError, match="model.norm.weight: expected at most 65504"):
        write_decoder(replace(compiled, vectors=loud), tmp_path, CoreaiOptions(), lambda *_: None)


@pytest.mark.small
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (CoreaiOptions(prompt_lengths=(0, 32)), "`prompt_lengths`: expected positive integers, found '0,32'"),
        (CoreaiOptions(prompt_lengths=()), "`prompt_lengths`: expected positive integers, found ''"),
        (CoreaiOptions(max_seq_len=0), "`max_seq_len`: for Core AI expected at least 1, found 0"),
    ],
)
def test_options_are_refused_before_compiling(options: CoreaiOptions, problem: str) -> None:
    check_options("decoder", CoreaiOptions(), "int4", 32)
    with pytest.raises(LimeEdgeError, match=problem):
        check_options("decoder", options, "int4", 32)


@pytest.mark.small
def test_activations_are_of_both_targets() -> None:
    """One option of the command line: unsaid, it is the device's for ONNX and float16 here."""
    with pytest.raises(LimeEdgeError, match="`activations`: expected float32 or float16, found 'int8'"):
        CoreaiOptions(activations="int8")
    told: dict[str, Any] = {name: getattr(CoreaiOptions(), name) for name in ("max_seq_len",)}
    told |= {"prompt_lengths": "32,128", "activations": None, "backend": "xnnpack", "stock_runner": False}
    told |= {"compute_units": "all", "minimum_os": "iOS18"}
    options = read_told(told, ["onnx", "coreai"], find_device("cpu"))
    assert (options["onnx"].activations, options["coreai"].activations) == ("float32", "float16")
    options = read_told(told | {"activations": "float32"}, ["coreai"], find_device("jetson"))
    assert options["coreai"].activations == "float32"


def test_the_limits_of_a_session(tiny_model: Make, tiny_adapter: Make, core_bundle: Make) -> None:
    """The cache's end is reached to the token; a routed prompt beyond every length is refused, a pinned one is cut."""
    model = tiny_model("llama")
    path = core_bundle(str(model), str(tiny_adapter(model, routing=ROUTINGS["soft"])), quant="int8")
    with pytest.raises(LimeEdgeError, match=f"max_length: expected 1..{CONTEXT}, found 5000") as caught:
        open_decoder(Bundle.open(path), "coreai", SessionOptions(max_length=5000))
    assert "`max_seq_len` at export" in caught.value.hint
    with pytest.raises(LimeEdgeError, match="none of the execution providers|none of the providers"):
        open_decoder(Bundle.open(path), "coreai", SessionOptions(providers=("CoreML",)))
    session, ids = open_on(path), draw_ids(CONTEXT)
    oracle = DecoderModule(compile_again(model, tiny_adapter(model, routing=ROUTINGS["soft"]), quant="int8"))
    session.use("routed")
    with pytest.raises(LimeEdgeError, match=f"takes up to {PROMPT} tokens in one call, found 17"):
        session.logits(ids[0, :17].tolist())
    session.use("expert0")
    found = session.logits(ids[0].tolist())
    compare(found, oracle(ids, residual_of(session, "expert0"))[0].numpy(), "a full cache")


@pytest.mark.small
@pytest.mark.parametrize(
    ("count", "free", "plan"),
    [
        (1, 100, [1]),
        (2, 100, [32]),
        (33, 100, [32, 1]),
        (40, 100, [32, 32]),
        (70, 1000, [128]),
        (70, 100, [32, 32, 32]),  # 128 would not fit
        (40, 63, [32, *[1] * 8]),  # nor would a second 32
        (3, 3, [1, 1, 1]),
    ],
)
def test_prompts_are_cut_into_the_lengths_of_the_file(count: int, free: int, plan: list[int]) -> None:
    assert plan_calls(count, [1, 32, 128], free) == plan


def test_the_script_for_macs_takes_the_target(
    tiny_model: Make, tiny_adapter: Make, core_bundle: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers and times on the interpreter; what needs a Mac, or is Core ML's, is refused."""
    spec = importlib.util.spec_from_file_location("verify_on_mac", ROOT / "examples" / "ios" / "verify_on_mac.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    path = str(core_bundle(*map(str, build(CASES["llama-tied"], tiny_model, tiny_adapter)), quant="int4"))
    words = ["--target", "coreai", "--iterations", "1"]
    assert script.main([path, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["units"]["interpreter"]
    assert found["provider"] == "CoreAI-interpreter" and found["numbers"]["missed"] == []
    assert found["numbers"]["worst_error"] < 1e-4 and {"prompt 16", "decode", "switch"} <= set(found["times"])
    assert script.main([path, *words, "--units", "gpu"]) == 4
    assert "Core AI needs a Mac" in capsys.readouterr().err
    for wrong in (["--units", "all"], ["--plan"]):
        with pytest.raises(SystemExit):
            script.main([path, *words, *wrong])
    assert script.main([path, "--iterations", "1"]) == 2
    assert "expected a bundle for coreml, found coreai" in capsys.readouterr().err


@pytest.mark.small
def test_without_the_packages_the_extra_is_named() -> None:
    """A stranger who has neither: exporting and running say what to install, and importing lime_edge needs neither."""
    code = """
import sys
for name in ("coreai", "coreai_torch"):
    sys.modules[name] = None
import lime_edge.cli.app
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.coreai.health import examine
for module in ("lime_edge.exporters.coreai.entry", "lime_edge.runtimes.coreai.entry"):
    try:
        __import__(module)
    except LimeEdgeError as error:
        print(error.problem, "|", error.hint, "|", error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.endswith(" | 4") for line in lines), done
    assert all("is not installed" in line and "pip install 'lime-edge[coreai]'" in line for line in lines)
