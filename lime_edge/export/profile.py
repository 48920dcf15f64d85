"""From a task's examples to a pinned expert in a bundle, and how close it comes. Needs the workstation's packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.prompts import TextCodec
from lime_edge.checks.evaluate import Example, evaluate
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.profiling import average_routing, mix_experts
from lime_edge.compiler.options import CompileOptions, Progress
from lime_edge.errors import LimeEdgeError
from lime_edge.export.describe import identify
from lime_edge.session.decoder import Session
from lime_edge.session.kinds import DECODER, require_kind
from lime_edge.session.open import open_decoder


def add_profile(
    bundle: Path, model: Path, adapter: Path, examples: list[Example], name: str, force: bool, progress: Progress
) -> float:
    """Average the routing over the examples (prompt and answer) and write the mixture into the bundle.

    Returns:
        How many experts the mixture uses: the exponential of the weights' entropy, mean over sites.
    Raises:
        LimeEdgeError: the bundle is of another backbone or adapter, or the checkpoint has no routing.
    """
    opened = Bundle.open(bundle)
    require_kind(opened, DECODER)
    if opened.manifest.vision is not None:
        raise LimeEdgeError(
            f"{bundle}: routing cannot be averaged over texts of a model that sees",
            "its texts alone are not what was trained on",
        )
    checkpoint = read_checkpoint(model, adapter)
    adapter_id = identify(checkpoint.adapter, checkpoint.sites)
    wanted = (opened.manifest.backbone.fingerprint, opened.manifest.adapter_id)
    if (checkpoint.backbone.fingerprint, adapter_id) != wanted:
        raise LimeEdgeError(
            f"{bundle} was not exported from {model} with {adapter}", "name the model and the adapter of the export"
        )
    compiled = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    codec = TextCodec(bundle / "tokenizer")
    sequences = [(codec.encode(e.prompt), codec.encode(e.answer)) for e in examples]
    weights = average_routing(compiled, sequences, lambda done: progress("route", done, len(sequences)))
    vector = mix_experts(compiled, weights).numpy().astype(opened.manifest.adapter.expert_dtype)
    note = f"routing averaged over {len(examples)} examples"
    add_experts(bundle, [Expert(name, vector, adapter_id, note)], replace=force)
    used = [torch.exp(-(w * w.clamp_min(1e-12).log()).sum()) for w in weights.values()]
    return float(torch.stack(used).mean())


def compare_profile(bundle: Path, examples: list[Example], name: str, progress: Progress) -> list[dict[str, Any]]:
    """Accuracy and loss of routed, of the profile, and of every single expert, the best of them first."""
    session = open_decoder(Bundle.open(bundle))
    selections = ["routed", name, *(other for other in session.experts if other != name)]
    rows: list[dict[str, Any]] = []
    for index, selection in enumerate(selections):
        progress("compare", index, len(selections))
        session.use(selection)
        accuracy = evaluate(session, examples).accuracy
        rows.append({"selection": selection, "accuracy": accuracy, "loss": measure_loss(session, examples)})
    progress("compare", len(selections), len(selections))
    return rows[:2] + sorted(rows[2:], key=lambda row: row["loss"])


def measure_loss(session: Session, examples: list[Example]) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats: the prompt in one call, then token by token."""
    losses = []
    for example in examples:
        logits = session.logits(session.codec.encode(example.prompt), keep=1)
        for token in session.codec.encode(example.answer):
            row = logits[-1].astype(np.float64)
            losses.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token]))
            logits = session.extend([token])
    return float(np.mean(losses))
