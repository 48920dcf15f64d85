"""Float32 fidelity on the real model: bundles against `transformers` with the adapter unfolded.

Exports SmolLM2-135M with --quant none under the three fold policies, with the starter's experts and
with experts drawn from N(1, 0.5), and compares logits for every expert, a blend and none, then greedy
text on 20 prompts. A bundle whose branch is removed must miss. Exit code 3 on a miss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import lime_edge
from lime_edge import terminal
from lime_edge.bundle.experts import Selection
from lime_edge.checks.evaluate import read_examples
from lime_edge.cli.demo import find_backbone
from lime_edge.compiler.formats.backbone import quiet
from lime_edge.compiler.formats.decoder import find_gguf
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions
from lime_edge.targets.devices import find_device

STARTER = Path("examples/starter_adapter")
ABSOLUTE = RELATIVE = 1e-4


def load_reference(model: Path) -> LlamaForCausalLM:
    """The backbone as `transformers` builds it."""
    gguf = find_gguf(model)
    assert gguf is not None
    with quiet():
        return LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


def randomize(adapter: Path, out: Path) -> Path:
    """A copy of an adapter whose experts are drawn from N(1, 0.5)."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".LiMEs"):
            tensors[name] = torch.normal(1.0, 0.5, tensor.shape, generator=generator)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def unfold(model: LlamaForCausalLM, adapter: Path) -> UnfoldedModel:
    """The reference: frozen layers plus the adapter, nothing folded."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    sites: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        site, _, part = name.rpartition(".")
        sites.setdefault(site, {})[part] = tensor.float()
    hyper = {
        "variant": config["variant"],
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "num_experts": config["num_experts"],
    }
    return UnfoldedModel(model, sites, hyper)


def to_indices(selection: Selection, names: tuple[str, ...]) -> int | dict[int, float] | None:
    """A selection by name as the reference takes it: by number."""
    if selection is None:
        return None
    if isinstance(selection, str):
        return names.index(selection)
    return {names.index(name): weight for name, weight in selection.items()}


def miss(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error as a multiple of the tolerance: above 1 is a miss."""
    return float((np.abs(got - expected) / (ABSOLUTE + RELATIVE * np.abs(expected))).max())


def compare_logits(session: Session, reference: UnfoldedModel, prompts: list[str]) -> Iterator[tuple[str, float]]:
    """(selection, worst miss) for every expert, a blend, and none."""
    names = session.experts
    for selection in [*names, {names[0]: 0.6, names[-1]: 0.4}, None]:
        session.use(selection)
        reference.use(to_indices(selection, names))
        worst = 0.0
        for prompt in prompts:
            ids = session.codec.encode(prompt)
            with torch.no_grad():
                expected = reference.logits({"input_ids": torch.tensor([ids])})[0].numpy()
            worst = max(worst, miss(session.logits(ids), expected))
        yield str(selection), worst


def compare_text(session: Session, reference: UnfoldedModel, prompts: list[tuple[str, str]]) -> int:
    """Prompts whose greedy 16 tokens differ. prompts: (expert, text)."""
    wrong = 0
    for name, prompt in prompts:
        session.use(name)
        reference.use(to_indices(name, session.experts))
        ids = session.codec.encode(prompt)
        options = GenerationOptions(max_new_tokens=16, ignore_eos=True)
        ours = list(session.generate_ids(ids, options))
        with torch.no_grad():
            theirs = reference.generate(torch.tensor([ids]), 16)[0].tolist()
        wrong += ours != theirs[-16:]
    return wrong


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", nargs="*", default=["shared", "none", "movie"])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = find_backbone()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        randomized = randomize(STARTER / "adapter", Path(folder) / "random")
        adapters = {"starter": STARTER / "adapter", "N(1, 0.5)": randomized}
        examples = {
            task: read_examples(STARTER / "eval" / f"{task}.jsonl") for task in ("intent", "movie", "negate", "inflect")
        }
        for label, adapter in adapters.items():
            reference = unfold(load_reference(model), adapter)
            for fold in arguments.folds:
                path = Path(folder) / "x.lime"
                with terminal.show_steps() as progress:
                    export_bundle(
                        model,
                        adapter,
                        path,
                        CompileOptions(quant="none", fold=fold),
                        find_device("cpu"),
                        ExportOptions(force=True),
                        progress,
                    )
                session = lime_edge.open_decoder(path, threads=2)
                prompts = [examples[task][0].prompt for task in examples]
                for selection, worst in compare_logits(session, reference, prompts):
                    rows.append([label, fold, selection, f"{worst:.3f}"])
                    failed |= worst > 1
                texts = [(task, e.prompt) for task in examples for e in examples[task][:5]]
                wrong = compare_text(session, reference, texts)
                rows.append([label, fold, "greedy text on 20 prompts", f"{wrong} differ"])
                failed |= wrong > 0
                if label != "starter":
                    failed |= not branch_matters(session, reference, prompts[0], rows, fold)
                del session
    terminal.print_table(
        "error as a multiple of 1e-4 absolute + 1e-4 relative",
        {"experts": "left", "fold": "left", "selection": "left", "worst": "right"},
        rows,
    )
    sys.exit(3 if failed else 0)


def branch_matters(session: Session, reference: UnfoldedModel, prompt: str, rows: list[list[str]], fold: str) -> bool:
    """Whether the comparison notices a removed branch (a zero residual)."""
    name = session.experts[0]
    session.use(name)
    session._engine.set_expert(np.zeros(session.bundle.manifest.sites.total, np.float32))
    reference.use(to_indices(name, session.experts))
    ids = session.codec.encode(prompt)
    with torch.no_grad():
        expected = reference.logits({"input_ids": torch.tensor([ids])})[0].numpy()
    worst = miss(session.logits(ids), expected)
    rows.append(["N(1, 0.5)", fold, f"{name}, branch removed (must miss)", f"{worst:.0f}"])
    return worst > 10


if __name__ == "__main__":
    main()
