"""A compiled model for other programs: its integers as GGUF Q4_0, its values as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lime_edge.compiler.formats.interchange import PlainLora, encode_gguf, interleave_rows, write_peft
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel


def write_folder(model: CompiledModel, config: object, directory: Path) -> None:
    """Weights in float16, a config, and a tokenizer of one word: GenAI's builder wants some tokenizer.

    Args:
        config: the transformers config that the model was made of.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]  # type: ignore[attr-defined]
    config.save_pretrained(directory)  # type: ignore[attr-defined]
    own = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)
    tensors = {name: model.weight(name).half() for name in model.weights} | dict(model.vectors)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def write_gguf(model: CompiledModel, file: Path) -> None:
    """Every matrix as Q4_0, which holds our codes and scales as they are; no vocabulary."""
    import gguf

    decoder = model.decoder
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_block_count(len(decoder.layers))
    writer.add_feed_forward_length(decoder.intermediate)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_vocab_size(decoder.vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(decoder.layers))
    heads = {"q_proj": decoder.heads, "k_proj": decoder.kv_heads}
    for name, tensor in {**model.weights, **model.vectors}.items():
        target = names.get_name(name, try_suffixes=(".weight",))
        if isinstance(tensor, QuantizedTensor):
            blocks = pack_q4_0(tensor, heads.get(name.split(".")[-2], 0))
            writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            assert isinstance(tensor, torch.Tensor)
            writer.add_tensor(target, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pack_q4_0(tensor: QuantizedTensor, heads: int) -> np.ndarray:
    """(N, K / 32 * 18) uint8: per block a float16 scale, then the low and the high halves' codes + 8.

    Args:
        heads: of a query or key projection, whose rows llama.cpp orders by pairs; 0 for the others.
    Source: ggml-org/ggml, block_q4_0.
    """
    codes, scales = tensor.codes, tensor.scales
    if heads:
        codes, scales = interleave_rows(codes, heads), interleave_rows(scales, heads)
    rows, groups = scales.shape
    halves = (codes.numpy().reshape(rows, groups, 2, 16) + 8).astype(np.uint8)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    heads_of_blocks = scales.numpy().astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate([heads_of_blocks, packed], axis=2).reshape(rows, groups * 18)


def pin(model: CompiledModel, expert: str) -> PlainLora:
    """An expert of a compiled model as a LoRA: B' = diag(p) B, the scale inside."""
    rank, sites = 0, {}
    for site in model.sites:
        branch = model.branches[site.name]
        assert branch.a is not None and branch.b is not None
        p = model.experts[expert][site.offset : site.offset + site.width].float()
        sites[site.name], rank = (branch.a, p[:, None] * branch.b), branch.a.shape[0]
    return PlainLora(expert, rank, float(rank), ("q_proj", "k_proj", "v_proj", "o_proj"), None, sites)


def write_loras(model: CompiledModel, expert: str, peft: Path, file: Path) -> None:
    """The expert for PEFT (and GenAI's builder) and for llama.cpp."""
    lora = pin(model, expert)
    peft.mkdir()
    write_peft(lora, peft, causal=True)
    file.write_bytes(encode_gguf(lora, model.decoder))
