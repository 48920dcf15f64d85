"""Our bundles: the real model's, and random models of a given shape made straight from integers.

Packed without what a bundle to ship also has (tokenizer, golden values, survival): nothing here reads it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from msgspec import structs
from transformers import LlamaConfig

from lime_edge import __version__
from lime_edge.bundle.fields import AdapterFacts, Backbone, DecoderFacts, Manifest, Quantization, SiteEntry
from lime_edge.bundle.manifest import convert_facts
from lime_edge.bundle.sites import SiteTable
from lime_edge.bundle.staging import stage_directory
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.architecture import Decoder, read_decoder
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.compiled import Branch, CompiledModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.export.describe import (
    choose_default,
    describe_sites,
    describe_targets,
    describe_weights,
)
from lime_edge.export.manifest import complete_bundle
from lime_edge.targets.registry import load_exporters

SHAPES = {
    "1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 32768,
    },
    "toy": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 32768,
    },
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, EXPERTS, GROUP = 8, 8, 32


def export_real(
    model: Path,
    adapter: Path,
    expert: str,
    kinds: tuple[str, ...] | None,
    outputs: dict[bool, Path],
    target: str = "onnx",
) -> None:
    """Compile a checkpoint twice: as it is (False), and with an expert merged and no branch (True).

    Rounded without calibration: no speed depends on how. kinds: what stays at int8, None for the exporter's choice.
    target: whose artifact; ExecuTorch's holds no routed method, whose lowering takes most of the time.
    """
    checkpoint = read_checkpoint(model, adapter)
    for single, output in outputs.items():
        if output.exists():
            continue
        options = CompileOptions(rounding="search", fold=expert if single else "shared", single=single)
        if kinds is not None:
            options = replace(options, keep_int8=kinds)
        compiled = compile_checkpoint(checkpoint, options)
        pack(compiled, checkpoint.backbone.name, checkpoint.backbone.eos, output, target)


def make_random(shape: str, expert: str, outputs: dict[bool, Path], target: str = "onnx") -> None:
    """A random int4 model: with 8 experts and a routed graph (False), and without a branch (True)."""
    model = draw_model(read_decoder(make_config(shape), shape))
    for single, output in outputs.items():
        if output.exists():
            continue
        merged = replace(
            model, branches={}, experts={expert: model.experts[expert]}, single=expert, fold=expert, routing=None
        )
        pack(merged if single else model, f"random, {shape}", (), output, target)


def make_config(shape: str) -> LlamaConfig:
    """The transformers config of a random model."""
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True)


def pack(model: CompiledModel, name: str, eos: tuple[int, ...], output: Path, target: str = "onnx") -> None:
    """Write a compiled model as a bundle with one target's artifact; ONNX also for GenAI, the others pinned only."""
    decoder, companions = model.decoder, ["genai"] if target == "onnx" else []
    model = model if target == "onnx" else replace(model, routing=None)
    output.parent.mkdir(parents=True, exist_ok=True)
    with stage_directory(output) as stage:
        (stage / target).mkdir()
        exporter = load_exporters([target], {}, model.quant, model.group, "decoder", companions)[target]
        facts = exporter.write(model, stage / target, lambda *_: None)
        weights = describe_weights(model.weights, model.quant, model.group)
        weights |= {"rounding": "nearest", "weight_hash": model.weight_hash()}
        providers = {"providers": ["CPUExecutionProvider" if target == "onnx" else "cpu"], "threads": None}
        manifest = Manifest(
            kind="decoder",
            adapter_id="0" * 64,  # nobody's: these experts fit no other bundle
            backbone=Backbone(
                name=name,
                family=decoder.family,
                fingerprint=model.fingerprint,
                context=decoder.context,
                vocab=decoder.vocab,
                hidden=decoder.hidden,
                layers=len(decoder.layers),
            ),
            decoder=DecoderFacts(heads=decoder.heads, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, eos=eos),
            adapter=convert_facts(
                AdapterFacts,
                {
                    "variant": model.variant.name,
                    "rank": RANK,
                    "alpha": 2.0 * RANK,
                    "fold": model.fold,
                    "single": model.single,
                    "expert_dtype": "float16",
                },
            ),
            quantization=convert_facts(Quantization, weights),
            default=choose_default(model.experts, None, model.single, model.variant.name),
            target_list=describe_targets({target: providers | facts}, model.quant),
            versions={"lime_edge": __version__},
            site_list=convert_facts(tuple[SiteEntry, ...], describe_sites(model.sites)),
        )
        manifest = structs.replace(manifest, companions=exporter.write_companions(model, stage, manifest))
        complete_bundle(stage, manifest, model.experts, model.reference)


def draw_model(decoder: Decoder) -> CompiledModel:
    """Random codes and scales that keep activations near 1, and a LiME adapter on q, k, v and o."""
    random = torch.Generator().manual_seed(0)
    weights: dict[str, QuantizedTensor | torch.Tensor] = {}
    vectors: dict[str, torch.Tensor] = {}
    for name, dims in decoder.tensors().items():
        if len(dims) == 1:
            vectors[name] = torch.ones(dims)
            continue
        codes = torch.randint(-8, 8, dims, generator=random, dtype=torch.int8)
        scale = 2.0 ** round(-2.2 - torch.tensor(float(dims[1])).log2().item() / 2)  # codes have a spread of 4.6
        weights[name] = QuantizedTensor(codes, torch.full((dims[0], dims[1] // GROUP), scale), 4, GROUP)
    branches, widths = {}, []
    for layer in range(len(decoder.layers)):
        for name, (height, depth) in decoder.linears(layer).items():
            if name.rsplit(".", 1)[-1] in KINDS:
                a = torch.randn(RANK, depth, generator=random) / depth**0.5
                branches[name] = Branch(a, 0.1 * torch.randn(height, RANK, generator=random))
                widths.append((name, height))
    sites = SiteTable.from_widths(widths)
    drawn = [1 + 0.1 * torch.randn(sites.total, generator=random) for _ in range(EXPERTS)]
    experts = {f"expert_{index}": vector.half() for index, vector in enumerate(drawn)}
    reference = torch.zeros(sites.total)  # nothing is folded: the weights are the original model's
    routing = RoutingConfig(top_k=2, auto_topk=True, temperature=0.5, soft_topk_temperature=0.1, gamma_routing=0.7)
    return CompiledModel(
        decoder=decoder,
        weights=weights,
        vectors=vectors,
        branches=branches,
        sites=sites,
        reference=reference,
        experts=experts,
        fingerprint="0" * 64,
        fold="none",
        single=None,
        quant="int4",
        group=GROUP,
        routing=routing,
    )
