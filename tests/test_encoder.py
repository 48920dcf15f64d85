"""Encoders and vision models: compiled, exported to ONNX and run, against the fixtures and unfolded models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from conformance import build_backbone, check_model, compare, read_model
from encoder_conformance import ONNX_MODEL_LIMIT, OnnxEncoderEngine, is_encoder_fixture, name_mode
from models import load_sites
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert, read_expert
from lime_edge.bundle.vectors import read_vectors
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.authors import split_state
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor, quantize
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.model.encoder_layers import CompiledLayer
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.calibrate import Calibration, Sample
from lime_edge.compiler.rounding.grams import collect_grams
from lime_edge.compiler.rounding.model import list_units
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.onnx.weights import unpack_codes
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device

FIXTURES = Path(__file__).parent / "fixtures" / "conformance" / "models"
ENCODERS = sorted(p.parent.name for p in FIXTURES.glob("*/lime.json") if is_encoder_fixture(json.loads(p.read_text())))
MODES: list[Any] = [0, 3, {0: 0.3, 2: 0.7}, {1: 1.5, 3: -0.5}, None, "routed"]
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(encoder_bundle: Exported) -> Exported:
    """exported(fixture, **options): its bundle; `imported` lies beside it."""
    return encoder_bundle


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported bert fixture: adapter/ and backbone/."""
    path = tmp_path_factory.mktemp("imported") / "bert"
    import_checkpoint(FIXTURES / "bert-lora-cls", path, ImportOptions())
    return path


@pytest.fixture(scope="module")
def small(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bert of one layer, for what is exported often."""
    path = tmp_path_factory.mktemp("small") / "backbone"
    config = transformers.BertConfig.from_pretrained(imported / "backbone", num_hidden_layers=1)
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    return path


def open_bundle(path: Path) -> EncoderSession:
    return open_encoder(Bundle.open(path, verify=True))


def unfold(name: str) -> UnfoldedModel:
    """The fixture's model with unfolded sites: the authors' formulas, nothing of ours folded."""
    fixture = read_model(FIXTURES / name)
    backbone, sites = split_state(load_file(fixture.directory / "model.safetensors"))
    return UnfoldedModel(build_backbone(fixture, backbone), sites, fixture.hyper)


def draw_inputs(session: EncoderSession, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a size of their own, the later texts shorter than the first."""
    if session.inputs == ("pixel_values",):
        random = torch.Generator().manual_seed(seed)
        shape = map(int, session.bundle.manifest.targets["onnx"].inputs[0].shape[1:])
        return {"pixel_values": torch.randn(batch, *shape, generator=random)}
    return draw_text(batch, length, session.bundle.manifest.backbone.vocab, seed)


def draw_text(batch: int, length: int, vocab: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (batch, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 100).long()}


def worst(found: np.ndarray, expected: Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.numpy()).max())


# float32


@pytest.mark.parametrize("name", ENCODERS)
def test_fixture_in_onnx(name: str, exported: Exported) -> None:
    fixture = read_model(FIXTURES / name)
    engine: Any = OnnxEncoderEngine(open_bundle(exported(name)))
    checks = list(check_model(fixture, engine, ONNX_MODEL_LIMIT))
    assert len(checks) == len(fixture.expected) - len(fixture.inputs)
    for check in checks:
        assert check.ok and check.error < 1e-4, check


def test_fixtures_are_both_kinds() -> None:
    assert {"bert-lora-cls", "vit-lora-cls"} <= set(ENCODERS)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_selection_equals_the_unfolded_model(name: str, exported: Exported) -> None:
    session, unfolded = open_bundle(exported(name)), unfold(name)
    seen = []
    for batch, length in ((1, 1), (3, 19)):
        inputs = draw_inputs(session, batch, length, seed=length)
        for mode in MODES:
            session.use(name_mode(session, mode))
            unfolded.use(mode)
            found = session.run(**{key: x.numpy() for key, x in inputs.items()})["logits"]
            assert worst(found, unfolded.logits(inputs)) < 1e-4, f"{name} {mode} {batch}x{length}"
            seen.append(found)
    several = seen[len(MODES) :]
    closest = min(float(np.abs(a - b).max()) for i, a in enumerate(several) for b in several[:i])
    assert closest > 1e-3, "two selections give the same logits: the comparison proves nothing"


@pytest.mark.parametrize("name", ENCODERS)
def test_without_the_branch_the_fixture_fails(name: str, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is traced from this module: what its branch does not add, the graph does not have."""
    compiled, fixture = compile_bundle(exported(name)), read_model(FIXTURES / name)
    inputs = {entry.name: torch.zeros(0) for entry in compiled.module.inputs} | fixture.inputs
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(CompiledLayer, "_branch", lambda self, x, true=CompiledLayer._branch: 0 * true(self, x))
        for index, vector in enumerate([*compiled.experts.values(), None]):
            key = "logits" if vector is None else f"pinned_logits.{index}"
            check = compare(name, key, fixture.expected[key], compiled.run(inputs, vector)["logits"], ONNX_MODEL_LIMIT)
            assert check.ok is not broken, check


# every variant


def make_variant(directory: Path, model: Path, variant: str, **routing: Any) -> tuple[Path, dict[str, Any]]:
    """A loud random adapter of a variant on key, value, a wide layer, the pooler and the word embedding."""
    directory.mkdir()
    layers = read_shapes(model, ("key", "value", "intermediate.dense", "pooler.dense", "word_embeddings"))
    random = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    tensors, rank, experts = {}, 3, 4
    for name, (rows, columns) in layers.items():
        embedding = name.endswith("word_embeddings")
        width, depth = (columns, rows) if embedding else (rows, columns)
        if variant == "slicefine":
            tensors[f"{name}.part_T"] = draw(rows, rank) if embedding else draw(rank, columns) / columns**0.5
        else:
            tensors[f"{name}.A"] = draw(rank, width if embedding else depth) / depth**0.5
            tall = embedding and variant != "lora"
            tensors[f"{name}.B"] = 0.3 * draw(rows if tall else width, rank)
        if variant == "dora":
            tensors[f"{name}.m"] = 1 + draw(width).abs()
        tensors[f"{name}.LiMEs"] = 1 + 0.5 * draw(experts, width)
        tensors[f"{name}.LiME_shared"], tensors[f"{name}.gamma"] = draw(width), torch.tensor([0.3])
    embeddings = [name for name in layers if name.endswith("word_embeddings")]
    config = {
        "peft_type": "LIME",
        "variant": variant,
        "target_modules": list(layers),
        "embedding_modules": embeddings,
        "pad_token_id": 0,
        "r": rank,
        "lora_alpha": 6.0,
        "num_experts": experts,
        "routing": "soft_topk",
        "expert_names": [f"expert{i}" for i in range(experts)],
        "use_shared_lime": True,
        **routing,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    hyper = {"variant": variant, "alpha": 6.0, "pad_token_id": 0, **routing}
    return directory, hyper


def read_shapes(model: Path, endings: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    tensors = load_file(model / "model.safetensors")
    names = [key for key in tensors if key.endswith(tuple(f"{ending}.weight" for ending in endings))]
    return {key.removesuffix(".weight"): tuple(tensors[key].shape) for key in names}


VARIANTS = [
    ("lora", {}),
    ("lora_fa", {"n_gram": 3}),
    ("slicefine", {}),
    ("dora", {"n_gram": 2, "auto_topk": True, "sparse_mode": True, "routing": "sparse_auto_topk"}),
]


@pytest.mark.parametrize("fold", ["shared", "none", "expert1"])
@pytest.mark.parametrize(("variant", "routing"), VARIANTS, ids=[variant for variant, _ in VARIANTS])
def test_variants_with_embeddings_equal_the_unfolded_model(
    variant: str, routing: dict[str, Any], fold: str, small: Path, tmp_path: Path
) -> None:
    adapter, hyper = make_variant(tmp_path / "adapter", small, variant, **routing)
    checkpoint = read_checkpoint(small, adapter)
    compiled = compile_checkpoint(checkpoint, CompileOptions(quant="none", fold=fold))
    unfolded = UnfoldedModel(checkpoint.backbone.model, load_sites(adapter)[0], hyper)
    inputs = draw_text(2, 9, 256)
    inputs["input_ids"][1, 4:] = 0  # padding, which an adapted embedding leaves alone
    for mode in ("routed", 0, 3):
        unfolded.use(mode)
        found = compiled.run(inputs, None if mode == "routed" else compiled.experts[f"expert{mode}"])["logits"]
        assert worst(found.numpy(), unfolded.logits(inputs)) < 1e-4, f"{variant} {mode}"


@pytest.mark.parametrize(("variant", "routing"), VARIANTS[2:], ids=[variant for variant, _ in VARIANTS[2:]])
def test_variants_in_onnx(variant: str, routing: dict[str, Any], small: Path, tmp_path: Path) -> None:
    adapter, hyper = make_variant(tmp_path / "adapter", small, variant, **routing)
    output = tmp_path / "bundle.lime"
    export_bundle(
        small, adapter, output, CompileOptions(quant="none"), find_device("cpu"), ExportOptions(tokenizer=False)
    )
    session = open_bundle(output)
    model = transformers.BertForSequenceClassification.from_pretrained(small).eval()
    unfolded = UnfoldedModel(model, load_sites(adapter)[0], hyper)
    inputs = draw_inputs(session, 2, 9)
    inputs["input_ids"][1, 4:] = 0
    for mode in MODES:
        if mode is None and variant in ("dora", "slicefine"):
            with pytest.raises(LimeEdgeError, match="cannot be switched off"):
                session.use(None)
            continue
        session.use(name_mode(session, mode))
        unfolded.use(mode)
        found = session.run(**{key: x.numpy() for key, x in inputs.items()})["logits"]
        assert worst(found, unfolded.logits(inputs)) < 1e-4, f"{variant} {mode}"


@pytest.mark.parametrize("variant", ["lora", "dora", "slicefine"])
def test_single_expert_equals_pinned(variant: str, small: Path, tmp_path: Path) -> None:
    adapter, hyper = make_variant(tmp_path / "adapter", small, variant)
    checkpoint = read_checkpoint(small, adapter)
    options = CompileOptions(quant="none", fold="expert2", single=True)
    single = compile_checkpoint(checkpoint, options)
    unfolded = UnfoldedModel(checkpoint.backbone.model, load_sites(adapter)[0], hyper)
    unfolded.use(2)
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    found = single.run(inputs, single.experts["expert2"])["logits"]
    assert worst(found.numpy(), unfolded.logits(inputs)) < 1e-5
    assert list(single.experts) == ["expert2"] and not any(layer.parts for layer in single.module.layers.values())


# quantized


def compile_bundle(bundle: Path) -> CompiledEncoder:
    """What the bundle was made of, compiled again."""
    quant = Bundle.open(bundle).manifest.quantization.quant
    imported = bundle.parent / "imported"
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    return compile_checkpoint(checkpoint, CompileOptions(quant=quant, keep_int8=KEPT))


def read_initializers(file: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(file).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


QUANTIZED = pytest.mark.parametrize(("name", "quant"), [("bert-lora-cls", "int4"), ("vit-lora-cls", "int8")])
KEPT = ("qkv",)  # the tables at int4 too


@QUANTIZED
def test_integers_in_the_file_are_the_compilers(name: str, quant: str, exported: Exported) -> None:
    bundle = exported(name, quant=quant, keep_int8=KEPT)
    compiled = compile_bundle(bundle)
    manifest = Bundle.open(bundle).manifest
    assert manifest.quantization.weight_hash == compiled.weight_hash()
    assert {t.bits for t in compiled.weights.values() if isinstance(t, QuantizedTensor)} == (
        {8} if quant == "int8" else {4, 8}
    )
    for file in ("model.onnx", "routed.onnx"):
        graph, tensors = onnx.load(bundle / "onnx" / file).graph, read_initializers(bundle / "onnx" / file)
        scales = {node.input[1]: node.input[2] for node in graph.node if node.op_type == "MatMulNBits"}
        assert len(scales) == sum(not layer.embedding for layer in compiled.layers.values())
        for key, stored in compiled.weights.items():
            assert isinstance(stored, QuantizedTensor)
            layer = key.removesuffix(".weight")
            codes = tensors[f"{layer}.codes"]
            factors = tensors[scales.get(f"{layer}.codes", f"{layer}.scales")].reshape(codes.shape[0], -1)
            factors = factors[:, : stored.scales.shape[1]]  # a row's one scale is repeated for every block
            if codes.dtype == np.uint8:
                codes = unpack_codes(codes, stored.bits, stored.codes.shape[1])
            assert np.array_equal(codes, stored.codes.numpy()), f"{file} {layer}"
            assert np.array_equal(factors, stored.scales.numpy()), f"{file} {layer}"


def test_gptq_keeps_what_the_layers_put_out(imported: Path) -> None:
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    ids = torch.randint(1, 256, (40, 30), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = Calibration(tuple(Sample(tuple(row)) for row in ids), "random")
    options = CompileOptions(quant="int4", rounding="gptq")
    plain = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    narrow = {unit.names: unit.source for unit in list_units(plain, options) if unit.bits == 4 and unit.source}
    grams = collect_grams(plain, plain.module, calibration, set(narrow.values()))
    with_text, without = compile_checkpoint(checkpoint, options, calibration), compile_checkpoint(checkpoint, options)
    assert len(narrow) == len(grams) == 4
    for names, source in narrow.items():
        for name in names:
            errors = []
            for compiled in (with_text, without):
                off = compiled.weight(name) - plain.weight(name)
                errors.append(float(((off @ grams[source]) * off).sum()))
            assert errors[0] < 0.9 * errors[1], name


def test_grams_of_an_encoder_are_those_of_its_own_inputs(imported: Path) -> None:
    """Against hooks on the transformers model, no expert's doing: the first layer's query reads the embeddings."""
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    compiled = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    rows = [torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9)]
    calibration = Calibration(tuple(Sample(tuple(row.tolist()), "expert_1") for row in rows), "random")
    found = collect_grams(compiled, compiled.module, calibration)
    name = next(n for n in compiled.layers if n.endswith("0.attention.self.query"))
    seen: list[Tensor] = []
    layer = checkpoint.backbone.model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for row in rows:
        checkpoint.backbone.model(input_ids=row[None])
    hook.remove()
    torch.testing.assert_close(found[compiled.layers[name].source], sum(x.t() @ x for x in seen))


def test_branches_of_a_quantized_encoder_are_numbers_that_float16_holds(imported: Path) -> None:
    """As docs/folding.md promises, so that an exporter may store halves; the product moves by 2^-10 at most."""
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    exact, rounded = (compile_checkpoint(checkpoint, CompileOptions(quant=quant)) for quant in ("none", "int8"))
    changed = 0
    for name, branch in rounded.branches.items():
        assert branch.a is not None and branch.b is not None
        for matrix in (branch.a, branch.b):
            assert torch.equal(matrix.half().float(), matrix), name
        own = exact.branches[name]
        assert own.a is not None and own.b is not None
        product = own.b @ own.a
        assert float((branch.b @ branch.a - product).norm() / product.norm()) < 2**-10, name
        changed += not torch.equal(branch.b @ branch.a, product)
        layer = rounded.module.layers[name]
        a, b = layer.get_buffer("a"), layer.get_buffer("b")
        assert torch.equal(a.half().float(), a) and torch.equal(b.half().float(), b), name
    assert changed == len(rounded.sites), "nothing was rounded: the comparison proves nothing"


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_survival_of_an_encoder_is_that_of_the_definition(quant: str, exported: Exported) -> None:
    """Without a tokenizer all inputs count alike: ||(found - exact)|| / ||exact|| of the matrices themselves."""
    bundle = exported("bert-lora-cls", quant=quant, keep_int8=("head",), rounding="search")
    found = Bundle.open(bundle).manifest.quantization.survival
    assert found is not None
    imported = bundle.parent / "imported"
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    options = CompileOptions(quant=quant, keep_int8=("head",), rounding="search")
    exact, stored = (compile_checkpoint(checkpoint, how) for how in (CompileOptions(quant="none"), options))
    original, _ = checkpoint.backbone.split_state(())
    assert found.sites.keys() == {site.name for site in stored.sites}
    for site in stored.sites:
        key, branch = f"{site.name}.weight", exact.branches[site.name]
        tensor = stored.weights[key]
        assert isinstance(tensor, QuantizedTensor) and branch.a is not None and branch.b is not None
        start = quantize(original[key], tensor.bits, tensor.group).dequantize()
        noise = tensor.dequantize() - start - (exact.weight(key) - original[key])
        vectors = [vector[site.offset : site.offset + site.width] for vector in exact.experts.values()]
        effects = [p[:, None] * (branch.b @ branch.a) for p in vectors]
        worst = max(float(noise.norm() / effect.norm()) for effect in effects)
        assert found.sites[site.name].error == pytest.approx(worst, rel=0.02), site.name
    assert found.kinds["query"].bits == tuple([8 if quant == "int8" else 4])


@QUANTIZED
def test_quantized_graphs_compute_what_the_oracle_computes(name: str, quant: str, exported: Exported) -> None:
    """With float activations in place of the runtime's int8 ones, nothing is left but rounding of sums."""
    bundle = exported(name, quant=quant, keep_int8=KEPT)
    session, compiled = open_bundle(bundle), compile_bundle(bundle)
    inputs = draw_inputs(session, 3, 12)
    arrays = {key: x.numpy() for key, x in inputs.items()}
    for file, vectors in (("model.onnx", list(compiled.experts.values())), ("routed.onnx", [None])):
        exact = load_with_float_activations(bundle / "onnx" / file)
        for vector in vectors:
            expert = {} if vector is None else {"expert": (vector.float() - compiled.reference).numpy()}
            found = exact.run(["logits"], arrays | expert)[0]
            assert worst(found, compiled.run(inputs, vector)["logits"]) < 2e-4


def load_with_float_activations(file: Path) -> ort.InferenceSession:
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    changed = file.with_name(f"exact-{file.name}")
    onnx.save(model, changed)
    try:
        return ort.InferenceSession(str(changed))
    finally:
        changed.unlink()


def test_both_graphs_share_one_weight_file(exported: Exported) -> None:
    folder = exported("vit-lora-cls", quant="int8", keep_int8=KEPT) / "onnx"
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "model.onnx.data", "routed.onnx"]
    compiled = compile_bundle(folder.parent)
    packed = sum(t.nbytes() for t in compiled.weights.values() if isinstance(t, QuantizedTensor))
    pages = 4096 * len(read_initializers(folder / "routed.onnx"))
    assert (folder / "model.onnx.data").stat().st_size < 2 * packed + pages


def test_the_graph_names_nothing_of_this_machine(exported: Exported) -> None:
    for file in (exported("bert-lora-cls") / "onnx").glob("*.onnx"):
        text = file.read_bytes()
        assert b"site-packages" not in text and str(Path(__file__).parent.parent).encode() not in text


# the session


def test_experts_are_installed_used_and_refused(exported: Exported, tmp_path: Path) -> None:
    bundle = exported("bert-lora-cls")
    session = open_bundle(bundle)
    ids = np.arange(5)[None]
    first = session.run(input_ids=ids)["logits"]
    vector = read_expert(bundle / "experts" / "expert_1.safetensors").vector
    manifest = session.bundle.manifest
    file = tmp_path / "new.safetensors"
    file.write_bytes(Expert("new", vector, manifest.adapter_id).to_bytes())
    assert session.install(file) == "new"
    session.use("new")
    new = session.run(input_ids=ids)["logits"]
    session.use("expert_1")
    assert np.array_equal(new, session.run(input_ids=ids)["logits"]) and not np.array_equal(new, first)
    with pytest.raises(LimeEdgeError, match="in use"):
        session.remove("expert_1")
    session.remove("new")
    for selection, problem in (("new", "unknown expert"), ({"expert_0": 0.5}, "sum to 0.5")):
        with pytest.raises(LimeEdgeError, match=problem):
            session.use(selection)
    assert session.selection == "expert_1"
    file.write_bytes(Expert("other", vector, "0" * 64).to_bytes())
    with pytest.raises(LimeEdgeError, match="adapter_id"):
        session.install(file)


def test_vectors_of_another_adapter_are_refused(imported: Path, exported: Exported, tmp_path: Path) -> None:
    """The bundle says which shared adapter is in its weights, and that a shared vector belongs to it."""
    bundle = Bundle.open(exported("bert-lora-cls"))
    same = read_vectors(imported / "adapter", bundle)
    for expert in same:
        stored = read_expert(bundle.path / "experts" / f"{expert.name}.safetensors")
        assert np.array_equal(expert.vector, stored.vector), expert.name
    config, tensors = read_folder(imported / "adapter")
    assert config["use_shared_lime"] and bundle.manifest.adapter.shared_id is not None
    other = {name: tensor * 1.01 if name.endswith(".A") else tensor for name, tensor in tensors.items()}
    alone = {name: tensor for name, tensor in tensors.items() if name.endswith(".LiMEs")}
    for folder, (changes, kept, message) in {
        "other": ({}, other, "shared adapter"),
        "alone": (
            {"use_shared_lime": False, "adapter_id": bundle.manifest.adapter_id},
            alone,
            "LiME_shared and gamma: expected those of the bundle",
        ),
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        save_file(kept, tmp_path / folder / "adapter_model.safetensors")
        with pytest.raises(LimeEdgeError, match=message):
            read_vectors(tmp_path / folder, bundle)


def read_folder(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(adapter / "adapter_model.safetensors")


def test_inputs_are_checked(exported: Exported) -> None:
    session = open_bundle(exported("bert-lora-cls"))
    ids = np.arange(6).reshape(2, 3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "'input_ids' is missing"),
        ({"input_ids": ids, "pixels": ids}, "unknown input 'pixels'"),
        ({"input_ids": ids[0]}, "shape: expected"),
        ({"input_ids": ids + 0.5}, "dtype: expected int64"),
        ({"input_ids": ids - 1}, "expected 0..255, found -1..4"),
        ({"input_ids": ids, "attention_mask": np.ones((2, 4), int)}, r"attention_mask: shape: expected \(2, 3\)"),
        ({"input_ids": np.ones((1, 129), int)}, "tokens: expected at most 128, found 129"),
        ({"input_ids": np.ones((1, 0), int)}, "nothing empty"),
    ]
    for given, problem in wrong:
        with pytest.raises(LimeEdgeError, match=problem):
            session.run(**given)
    plain = session.run(input_ids=ids)["logits"]
    full = session.run(input_ids=ids.tolist(), attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    assert np.array_equal(plain, full["logits"])


def test_pixels_are_checked(exported: Exported) -> None:
    session = open_bundle(exported("vit-lora-cls"))
    with pytest.raises(LimeEdgeError, match="pixel_values: shape"):
        session.run(pixel_values=np.zeros((1, 3, 16, 32), np.float32))
    with pytest.raises(LimeEdgeError, match="NaN"):
        session.run(pixel_values=np.full((1, 3, 32, 32), np.nan, np.float32))


def test_manifest_says_what_it_is(exported: Exported) -> None:
    manifest = Bundle.open(exported("vit-lora-cls")).manifest
    assert manifest.kind == "encoder" and manifest.decoder is None and manifest.encoder is not None
    assert manifest.encoder.task == "image-classification"
    assert manifest.encoder.labels == tuple(f"LABEL_{index}" for index in range(7))


# a batch of experts


@pytest.mark.parametrize("fixture", ["bert-lora-cls", "vit-lora-cls"])
def test_every_row_of_a_batch_has_an_expert_of_its_own(fixture: str, exported: Exported) -> None:
    """Against the unfolded model, row by row; experts, a blend, none and routed beside each other."""
    session, unfolded = open_bundle(exported(fixture)), unfold(fixture)
    first, second = session.experts[:2]
    wanted: list[tuple[Any, Any]] = [
        (second, 1),
        (first, 0),
        (None, None),
        (second, 1),
        ({first: 0.7, second: 0.3}, {0: 0.7, 1: 0.3}),
    ]
    wanted += [("routed", "routed")] * 2 if session.bundle.manifest.targets["onnx"].routed else []
    inputs = draw_inputs(session, len(wanted), 9)
    before = session.selection
    found = session.run_many([selection for selection, _ in wanted], **{k: v.numpy() for k, v in inputs.items()})
    assert session.selection == before and set(found) == set(session.outputs)
    for row, (selection, mode) in enumerate(wanted):
        unfolded.use(mode)
        expected = unfolded.logits({name: value[row : row + 1] for name, value in inputs.items()})
        assert worst(found["logits"][row : row + 1], expected) < 1e-4, f"row {row}, {selection}"


def test_rows_and_selections_must_be_as_many(exported: Exported) -> None:
    session = open_bundle(exported("bert-lora-cls"))
    ids = np.ones((3, 4), np.int64)
    with pytest.raises(LimeEdgeError, match="expected 3 selections, one for each row, found 2"):
        session.run_many([None, None], input_ids=ids)
    before = session.selection
    with pytest.raises(LimeEdgeError, match="unknown expert 'nobody'"):
        session.run_many([None, "nobody", None], input_ids=ids)
    assert session.selection == before
