"""Run every conformance fixture in a directory: python tests/conformance.py DIR [--target T] [--json].

Prints checked / failed / worst error and exits 1 on any failure, 2 when there is nothing to run.
A fixture's shapes and hyper-parameters all come from its files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from encoder_conformance import EXACT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lime_edge
from lime_edge.compiler.formats.authors import split_state
from lime_edge.compiler.formats.hyper import ImportOptions, read_alpha
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.maths.layers import LimeLayer, Mode
from lime_edge.compiler.maths.prompt_tuning import compute_prompt, prepend_prompt, route_conditioned, route_static
from lime_edge.compiler.maths.variants import find_variant
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.generate import GenerationOptions
from lime_edge.targets.devices import find_device

LAYER_LIMIT = 1e-5
TORCH_MODEL_LIMIT = 1e-4
EXPORTED_MODEL_LIMIT = 1e-3


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is what `compare` or `compare_tokens` measured."""

    fixture: str
    what: str
    error: float
    limit: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.limit  # NaN is not <= anything


@dataclass(frozen=True)
class ModelFixture:
    """models/<name>: everything in its files, nothing computed."""

    name: str
    directory: Path
    hyper: Mapping[str, Any]
    expected: Mapping[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {key.removeprefix("in."): t for key, t in self.expected.items() if key.startswith("in.")}


class Engine:
    """What a target offers for one model fixture; a target subclasses it."""

    def logits(self, mode: Mode, inputs: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def generate(self, mode: Mode, inputs: Mapping[str, Tensor], new_tokens: int) -> Tensor:
        """Greedy with a cache, prompt first, then one token a call; (B, T + new_tokens)."""
        raise NotImplementedError


def compare(fixture: str, what: str, expected: Tensor, found: Tensor, limit: float, scaled: bool = False) -> Check:
    """Worst absolute difference of two float tensors.

    `scaled` divides it by max|expected| where that is above 1: a layer's outputs reach 30, where one
    float32 step is 4e-6 and an absolute 1e-5 would test the order of additions.
    """
    if expected.shape != found.shape:
        return Check(
            fixture, what, float("inf"), limit, f"shape: expected {tuple(expected.shape)}, found {tuple(found.shape)}"
        )
    worst = (expected.double() - found.double()).abs().max().item()
    return Check(fixture, what, worst / max(1.0, expected.abs().max().item()) if scaled else worst, limit)


def compare_tokens(fixture: str, what: str, expected: Tensor, found: Tensor) -> Check:
    """Number of unequal tokens of two (B, T) int64 tensors."""
    if expected.shape != found.shape:
        return Check(
            fixture, what, float("inf"), 0, f"shape: expected {tuple(expected.shape)}, found {tuple(found.shape)}"
        )
    unequal = int((expected != found).sum())
    problem = "" if not unequal else f"expected {expected.tolist()}, found {found.tolist()}"
    return Check(fixture, what, unequal, 0, problem)


def check_model(fixture: ModelFixture, engine: Engine, limit: float) -> Iterator[Check]:
    """Compare every expected tensor of a model fixture with what an engine computes."""
    inputs = fixture.inputs
    for key, expected in sorted(fixture.expected.items()):
        if key.startswith("in."):
            continue
        kind, _, expert = key.removeprefix("pinned_").partition(".")
        mode: Mode = int(expert) if key.startswith("pinned_") else "routed"
        if kind == "logits":
            yield compare(fixture.name, key, expected, engine.logits(mode, inputs), limit)
        elif kind == "generated":
            new_tokens = expected.shape[1] - inputs["input_ids"].shape[1]
            found = engine.generate(mode, inputs, new_tokens)
            yield compare_tokens(fixture.name, key, expected, found)
        else:
            yield Check(fixture.name, key, float("inf"), limit, "a key that this script does not know")


class TorchEngine(Engine):
    """The unfolded reference on a transformers model."""

    def __init__(self, fixture: ModelFixture):
        backbone, sites = split_state(load_file(fixture.directory / "model.safetensors"))
        model = build_backbone(fixture, backbone)
        self.unfolded = UnfoldedModel(model, sites, fixture.hyper)

    def logits(self, mode: Mode, inputs: Mapping[str, Tensor]) -> Tensor:
        self.unfolded.use(mode)
        return self.unfolded.logits(inputs)

    def generate(self, mode: Mode, inputs: Mapping[str, Tensor], new_tokens: int) -> Tensor:
        self.unfolded.use(mode)
        return self.unfolded.generate(inputs["input_ids"], new_tokens, inputs.get("attention_mask"))


def build_backbone(fixture: ModelFixture, state: Mapping[str, Tensor]) -> nn.Module:
    """The fixture's transformers model, float32, with this state dict and no adapter."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(fixture.directory)
    model: nn.Module = getattr(transformers, fixture.hyper["architecture"])(config).float()
    report = model.load_state_dict(state, strict=False)
    model.tie_weights()  # type: ignore[operator]
    loaded = {p.data_ptr() for name, p in model.named_parameters() if name in state}
    bare = [name for name in report.missing_keys if _pointer(model, name) not in loaded]
    if bare or report.unexpected_keys:
        raise LimeEdgeError(f"model.safetensors: missing {bare}, not of this model {report.unexpected_keys}")
    return model


def _pointer(model: nn.Module, name: str) -> int:
    return model.state_dict(keep_vars=True)[name].data_ptr()


def check_layer(name: str, path: Path) -> Iterator[Check]:
    """Compare one layer fixture with the unfolded layer."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        hyper = json.loads(file.metadata()["lime"])
    if hyper["variant"] == "prompt_tuning":
        yield from check_prompt(name, hyper, tensors)
        return
    embedding = hyper.get("module") == "embedding"
    x = tensors.pop("input_ids" if embedding else "x")
    expected, mask = tensors.pop("y"), tensors.pop("attention_mask", None)
    own = {key.removeprefix("linear.").removeprefix("embedding."): t for key, t in tensors.items()}
    rank = own["A"].shape[0] if "A" in own else own["part_T"].shape[int(embedding)]
    layer = LimeLayer(
        find_variant(hyper["variant"]),
        own,
        read_alpha(hyper) / rank,
        find_variant(hyper["variant"]).read_routing(hyper),
        embedding,
        hyper.get("pad_token_id"),
    )
    layer.attention_mask = mask
    yield compare(name, "y", expected, layer(x), LAYER_LIMIT, scaled=True)


def check_prompt(name: str, hyper: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Check]:
    """Compare one prompt tuning fixture."""
    routing = find_variant("prompt_tuning").read_routing(hyper)
    embeds, mask = tensors["input_embeds"], tensors.get("attention_mask")
    if hyper.get("input_conditioned", True):
        conditioning = hyper.get("input_conditioning_mode", "mean")
        weights = route_conditioned(tensors, routing, conditioning, embeds, mask)
    else:
        weights = route_static(tensors, routing)
    found, found_mask = prepend_prompt(compute_prompt(tensors, weights), embeds, mask)
    yield compare(name, "output_embeds", tensors["output_embeds"], found, LAYER_LIMIT, scaled=True)
    if "output_mask" in tensors and found_mask is not None:
        yield compare_tokens(name, "output_mask", tensors["output_mask"], found_mask)


def list_models(directory: Path) -> list[Path]:
    """The model fixtures below a directory."""
    return sorted(path.parent for path in (directory / "models").glob("*/lime.json"))


def read_model(path: Path) -> ModelFixture:
    """Read models/<name>."""
    hyper = json.loads((path / "lime.json").read_text())
    return ModelFixture(f"models/{path.name}", path, hyper, load_file(path / "expected.safetensors"))


def check_torch_model(path: Path) -> Iterator[Check]:
    """Compare one model fixture with the unfolded reference."""
    fixture = read_model(path)
    yield from check_model(fixture, TorchEngine(fixture), TORCH_MODEL_LIMIT)


def check_torch(directory: Path) -> Iterator[Check]:
    """All layers and all models against the unfolded reference."""
    for path in sorted((directory / "layers").glob("*.safetensors")):
        yield from guard(f"layers/{path.stem}", check_layer(f"layers/{path.stem}", path))
    for path in list_models(directory):
        yield from guard(f"models/{path.name}", check_torch_model(path))
    from vision_conformance import check_preprocessing, check_torch_vision, list_vision_models

    yield from check_preprocessing(directory)
    for path in list_vision_models(directory):
        yield from guard(f"vision/{path.name}", check_torch_vision(path))


class BundleEngine(Engine):
    """Import the authors' checkpoint, export it in float32, run the bundle's session."""

    def __init__(self, fixture: ModelFixture, folder: Path, target: str):
        imported = folder / "imported"
        import_checkpoint(fixture.directory, imported, ImportOptions())
        options = ExportOptions((target,), tokenizer=False, target_options=EXACT)
        export_bundle(
            imported / "backbone",
            imported / "adapter",
            folder / "x.lime",
            CompileOptions(quant="none"),
            find_device("cpu"),
            options,
        )
        self.session = lime_edge.open_decoder(folder / "x.lime", threads=1)

    def _use(self, mode: Mode) -> None:
        names = self.session.experts
        self.session.use(mode if isinstance(mode, str) else names[mode] if isinstance(mode, int) else None)

    def logits(self, mode: Mode, inputs: Mapping[str, Tensor]) -> Tensor:
        self._use(mode)
        return torch.stack([torch.from_numpy(self.session.logits(row.tolist()).copy()) for row in inputs["input_ids"]])

    def generate(self, mode: Mode, inputs: Mapping[str, Tensor], new_tokens: int) -> Tensor:
        self._use(mode)
        options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
        rows = [row.tolist() + list(self.session.generate_ids(row.tolist(), options)) for row in inputs["input_ids"]]
        return torch.tensor(rows)


def check_exported_model(path: Path, target: str) -> Iterator[Check]:
    """Compare one model fixture with its exported bundle."""
    fixture = read_model(path)
    with tempfile.TemporaryDirectory() as folder:
        yield from check_model(fixture, BundleEngine(fixture, Path(folder), target), EXPORTED_MODEL_LIMIT)


def check_exported(directory: Path, target: str) -> Iterator[Check]:
    """All models, exported to one target in float32."""
    from encoder_conformance import check_exported_encoder, is_encoder_fixture

    for path in list_models(directory):
        check = check_exported_encoder if is_encoder_fixture(read_model(path).hyper) else check_exported_model
        yield from guard(f"models/{path.name}", check(path, target))
    from vision_conformance import check_exported_vision, list_vision_models

    for path in list_vision_models(directory):
        yield from guard(f"vision/{path.name}", check_exported_vision(path, target))


def check_coreml(directory: Path) -> Iterator[Check]:
    """All models, exported to Core ML and interpreted; float16 has its own measure, see there."""
    from test_coreml_conformance import check_fixtures

    yield from check_fixtures(directory)


def guard(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Run one fixture's checks; whatever they raise is its failure, and the next fixture still runs."""
    try:
        yield from checks
    except Exception as fault:  # a crash of one fixture must not hide the others
        yield Check(name, "run", float("inf"), 0, f"{type(fault).__name__}: {fault}")


TARGETS: dict[str, Callable[[Path], Iterator[Check]]] = {
    "torch": check_torch,
    "onnx": partial(check_exported, target="onnx"),
    "executorch": partial(check_exported, target="executorch"),
    "coreml": check_coreml,
    "coreai": partial(check_exported, target="coreai"),
}


def describe(check: Check) -> dict[str, Any]:
    """A check as JSON has it: no infinity, no NaN."""
    return {**asdict(check), "error": check.error if math.isfinite(check.error) else None}


def report(checks: list[Check], target: str, as_json: bool) -> int:
    """Print the outcome; returns the exit code."""
    failures = [check for check in checks if not check.ok]
    fixtures, failed = {check.fixture for check in checks}, {check.fixture for check in failures}
    worst: dict[str, Check] = {}
    for check in checks:
        kind = check.fixture.split("/")[0] + (" tokens" if check.limit == 0 else "")
        if kind not in worst or not check.error <= worst[kind].error:
            worst[kind] = check
    if as_json:
        print(
            json.dumps(
                {
                    "target": target,
                    "checked": len(fixtures),
                    "failed": len(failed),
                    "comparisons": len(checks),
                    "worst": {kind: describe(check) for kind, check in worst.items()},
                    "failures": [describe(check) for check in failures],
                },
                indent=1,
            )
        )
    else:
        for check in failures:
            print(
                f"FAILED {check.fixture} {check.what}: error {check.error:.3g}, limit {check.limit:g} {check.problem}"
            )
        print(f"target {target}: checked {len(fixtures)} fixtures ({len(checks)} comparisons), failed {len(failed)}")
        for kind, check in worst.items():
            print(f"worst error, {kind}: {check.error:.3g} (limit {check.limit:g}) in {check.fixture} {check.what}")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="holds layers/, models/ and vision/")
    parser.add_argument("--target", choices=sorted(TARGETS), default="torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    checks = list(TARGETS[options.target](options.directory))
    if not checks:
        error = LimeEdgeError(
            f"{options.directory}: expected layers/*.safetensors, models/*/lime.json or vision/, found none"
        )
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return report(checks, options.target, options.json)


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads on busy cores are far slower than one
    sys.exit(main())
