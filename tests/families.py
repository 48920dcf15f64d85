"""Tiny models of every decoder family, with odd and unequal sizes, and what proves each of them on each target.

`tools/model_table.py` runs the same proofs for docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import ALL_LINEARS, ATTENTION, CASES, Case, draw_ids, load_model, load_sites

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.open import open_decoder

FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
HALF_FUSED = (*ATTENTION, "gate_up_proj", "down_proj")
WINDOW = 5
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ODD: dict[str, Any] = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80}
THREE: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96}
SLIDING: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": TYPES, "sliding_window": WINDOW}


def rope(kind: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    """rope_parameters of one rotation."""
    return {"rope_type": kind, "rope_theta": theta, **values}


def two_bases(**values: Any) -> dict[str, Any]:
    """rope_parameters of two rotations: the sliding layers' turns faster."""
    return {"rope_parameters": {"full_attention": rope(theta=1e6, **values), "sliding_attention": rope(theta=1e3)}}


def long_rope(pairs: int, part: float = 1.0) -> dict[str, Any]:
    """LongRoPE from 64 tokens to 256."""
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 0.5 * i for i in range(pairs)]
    scaled = rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=part)
    return {"rope_parameters": scaled, "max_position_embeddings": 256, "original_max_position_embeddings": 64}


GEMMA: dict[str, Any] = {"head_dim": 16, "tie_word_embeddings": True}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}
FAMILY_CASES: dict[str, Case] = {
    "gemma": Case("gemma", GEMMA, ALL_LINEARS),
    "gemma2": Case("gemma2", {**GEMMA, **SLIDING, **CAPS}, ALL_LINEARS, shared=True),
    "gemma2-biases": Case(
        "gemma2", {**THREE, **SLIDING, "head_dim": 24, "attention_bias": True}, ("q_proj", "up_proj")
    ),
    "gemma3": Case("gemma3_text", {**GEMMA, **SLIDING, **two_bases(), "query_pre_attn_scalar": 4}, ALL_LINEARS),
    "gemma3-linear": Case(
        "gemma3_text",
        {
            **THREE,
            **SLIDING,
            "head_dim": 16,
            "rope_parameters": {"full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": rope()},
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 2.0,
        },
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW}, FUSED, shared=True),
    "phi3-longrope": Case("phi3", {**ODD, **long_rope(6, 0.75), "tie_word_embeddings": True}, FUSED),
    "olmo2": Case("olmo2", {}, ALL_LINEARS, shared=True),
    "olmo2-biases": Case("olmo2", {**THREE, "attention_bias": True, "tie_word_embeddings": True}, ("k_proj", "o_proj")),
    "olmo3": Case("olmo3", {**SLIDING, **two_bases()}, ALL_LINEARS),
    "olmo3-yarn": Case(
        "olmo3",
        {
            **ODD,
            **SLIDING,
            "rope_parameters": {
                "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=16),
                "sliding_attention": rope(),
            },
        },
    ),
    "ministral": Case("ministral", {**SLIDING, "head_dim": 32}, ALL_LINEARS),
    "hunyuan": Case("hunyuan_v1_dense", {"head_dim": 16, "tie_word_embeddings": True}, ALL_LINEARS, shared=True),
    "hunyuan-alpha": Case(
        "hunyuan_v1_dense",
        {**THREE, "attention_bias": True, "head_dim": 32, "rope_parameters": rope("dynamic", alpha=1000.0, factor=1.0)},
    ),
    "ernie4_5": Case("ernie4_5", {"head_dim": 16, "use_bias": True}, ALL_LINEARS),
    "ernie4_5-tied": Case("ernie4_5", {**ODD, "head_dim": 24, "tie_word_embeddings": True}),
    "exaone4": Case("exaone4", SLIDING, ALL_LINEARS),
    "exaone4-full": Case(
        "exaone4",
        {**THREE, "sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
    ),
    "arcee": Case(
        "arcee", {"attention_bias": True, "mlp_bias": True}, (*ATTENTION, "up_proj", "down_proj"), shared=True
    ),
    "arcee-yarn": Case(
        "arcee",
        {
            **THREE,
            "tie_word_embeddings": True,
            "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        },
    ),
    "helium": Case("helium", {**ODD, "head_dim": 16}, ALL_LINEARS),
    "stablelm": Case("stablelm", {"use_qkv_bias": True}, ALL_LINEARS, shared=True),
    "stablelm-parallel": Case(
        "stablelm",
        {
            **ODD,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": rope(partial_rotary_factor=0.5),
            "tie_word_embeddings": True,
        },
        ALL_LINEARS,
    ),
    "glm": Case("glm", {"head_dim": 32, "rope_parameters": rope(partial_rotary_factor=0.5)}, HALF_FUSED),
    "glm4": Case("glm4", {"head_dim": 16, "rope_parameters": rope(partial_rotary_factor=0.5)}, HALF_FUSED, shared=True),
    "glm4-plain": Case("glm4", {**THREE, "head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
    "cohere": Case("cohere", {"use_qk_norm": True, "logit_scale": 0.25}, ALL_LINEARS),
    "cohere2": Case("cohere2", {**SLIDING, "tie_word_embeddings": True, "logit_scale": 2.0}, ALL_LINEARS, shared=True),
    "cohere2-biases": Case(
        "cohere2", {**THREE, **SLIDING, "attention_bias": True, "logit_scale": 1.5}, ("v_proj", "down_proj")
    ),
    "llama-dynamic": Case("llama", {"rope_parameters": rope("dynamic", factor=4.0)}, ("q_proj", "v_proj")),
}

# the families that tests/models.py has, one case of each; theirs are proved case by case in test_decoder and others
FIRST = ("llama-tied", "mistral-window", "qwen2-sliding", "qwen3-sliding", "smollm3-sliding", "seed_oss", "granite")
KNOWN = {name: CASES[name] for name in FIRST}
LENGTH, PROMPT, NEW = 41, 20, 20  # beyond every window; more rows than one call of a program gives
LIMITS = {"torch": 1e-4, "onnx": 1e-4, "executorch": 1e-4, "coreml": 1e-4}  # of the largest logit, at least of 1


def list_cases(family: str) -> dict[str, Case]:
    """The cases of one family, the plainest first."""
    return {name: case for name, case in {**KNOWN, **FAMILY_CASES}.items() if case.family == family}


def measure(found: np.ndarray, wanted: np.ndarray) -> float:
    """Worst difference, of the largest logit where that is above 1."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def prove_torch(model: Path, adapter: Path, bundle: Path) -> float:
    """The oracle against `transformers` with unfolded layers: whole, in pieces with the cache, greedy. Worst error.

    Args:
        bundle: not read.
    """
    compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
    module, unfolded, ids = DecoderModule(compiled), unfold(model, adapter), draw_ids(LENGTH)
    residuals = {1: compiled.experts["expert1"] - compiled.reference, None: -compiled.reference}
    errors, texts = [], []
    for mode, d in residuals.items():
        unfolded.use(mode)
        wanted, cache = unfolded.logits({"input_ids": ids})[0].numpy(), Cache()
        pieces = [module(piece, d, cache)[0] for piece in (ids[:, :7], ids[:, 7:30], *ids[:, 30:].split(1, dim=1))]
        errors += [measure(module(ids, d)[0].numpy(), wanted), measure(torch.cat(pieces).numpy(), wanted)]
        texts.append(unfolded.generate(ids[:, :PROMPT], NEW)[0, PROMPT:].tolist())
        assert module.greedy(ids[:, :PROMPT], d, NEW) == texts[-1], f"expert {mode}: another text"
    assert texts[0] != texts[1], "the expert changes nothing"
    return max(errors)


def prove_session(session: Session, model: Path, adapter: Path) -> float:
    """A target in float32 against `transformers` with unfolded layers: all rows, the last row, greedy. Worst error."""
    unfolded, ids, errors = unfold(model, adapter), draw_ids(LENGTH, seed=1), []
    for selection, mode in ((None, None), ("expert1", 1)):
        unfolded.use(mode)
        session.use(selection)
        wanted = unfolded.logits({"input_ids": ids})[0].numpy()
        errors.append(measure(session.logits(ids[0].tolist()), wanted))
        errors.append(measure(session.logits(ids[0].tolist(), keep=1), wanted[-1:]))
        tokens = unfolded.generate(ids[:, :PROMPT], NEW)[0, PROMPT:].tolist()
        found = session.generate_ids(ids[0, :PROMPT].tolist(), GenerationOptions(NEW, ignore_eos=True))
        assert list(found) == tokens, f"{selection}: another text"
    return max(errors)


def prove_onnx(model: Path, adapter: Path, bundle: Path) -> float:
    """See `prove_session`."""
    return prove_session(lime_edge.open_decoder(bundle, target="onnx", threads=1), model, adapter)


def prove_executorch(model: Path, adapter: Path, bundle: Path) -> float:
    """See `prove_session`."""
    return prove_session(lime_edge.open_decoder(bundle, target="executorch", threads=1), model, adapter)


def prove_coreml(model: Path, adapter: Path, bundle: Path) -> float:
    """The program, interpreted in float32, against the oracle that holds the same float16 tensors. Worst error."""
    from test_coreml_export import EXACT, check_selection, make_oracle, residual_of

    compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
    session, oracle = (
        open_decoder(Bundle.open(bundle), "coreml", SessionOptions(providers=(EXACT,))),
        make_oracle(compiled),
    )
    errors, ids = [], draw_ids(32, seed=3)
    for selection in (None, "expert1"):
        check_selection(session, oracle, selection, bundle.name)
        wanted = oracle(ids, residual_of(session, selection))[0].numpy()
        errors.append(measure(session.logits(ids[0].tolist()), wanted))
    return max(errors)


PROOFS: dict[str, Callable[[Path, Path, Path], float]] = {
    "torch": prove_torch,
    "onnx": prove_onnx,
    "executorch": prove_executorch,
    "coreml": prove_coreml,
}


def unfold(model: Path, adapter: Path) -> UnfoldedModel:
    """`transformers` with unfolded LiME layers."""
    return UnfoldedModel(load_model(model), *load_sites(adapter))
