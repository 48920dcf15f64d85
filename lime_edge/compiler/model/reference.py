"""The unfolded reference: a transformers model whose target modules are unfolded LiME layers.

Computes what the authors' code computes, by the plain formulas. It shares nothing with the folded
path but the definition of a variant, so tests and conformance may use it as an oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.hyper import read_alpha
from lime_edge.compiler.maths.layers import LimeLayer, Mode, check_mode
from lime_edge.compiler.maths.variants import SLICEFINE, find_variant
from lime_edge.errors import Faults


class UnfoldedModel:
    """A loaded transformers model with its sites replaced; `restore` puts the originals back."""

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Mapping[str, Tensor]],
        hyper: Mapping[str, object],
        mask_padding: bool = False,
        header: int = 0,
    ):
        """Replace every site of the model; it starts routed.

        Args:
            model: any transformers model; switched to eval mode.
            sites: module name -> adapter tensors, names as in the reference checkpoint (`A`, `B`, `m`,
                `part_T`, `part_F`, `bias`, `LiMEs`, `LiME_shared`, `gamma`); the base weight and bias
                are the module's own.
            hyper: `variant`, `alpha`, `pad_token_id` and the routing's, keys as in the reference.
            mask_padding: give the model's attention_mask to the sites, so that padded positions get the
                frozen output (the reference does so only on request).
            header: of a prompt's tokens the last ones, from which on the adapter acts; 0: it always acts.
        Raises:
            LimeEdgeError: a site that is no linear layer or embedding of the model, or lacks tensors.
        """
        self.model = model.eval()
        self.variant = find_variant(hyper.get("variant"))
        self.mask_padding, self.header = mask_padding, header
        self.mode: Mode = "routed"
        self.layers: dict[str, LimeLayer] = {}
        self.originals: dict[str, nn.Module] = {}
        modules = dict(model.named_modules())
        with Faults("sites", "the adapter was trained on another model, or is damaged") as faults:
            for name, adapter in sites.items():
                module = modules.get(name)
                if not _is_plain(module):
                    faults.add(name, "a linear layer or an embedding of the model", type(module).__name__)
                elif "LiMEs" not in adapter:
                    faults.add(name, "a tensor LiMEs", ", ".join(sorted(adapter)))
        for name, adapter in sites.items():
            self.originals[name] = modules[name]
            self.layers[name] = make_layer(modules[name], adapter, hyper)
            model.set_submodule(name, self.layers[name])

    def use(self, mode: Mode) -> None:
        """Switch every site: None, an expert's index, index -> weight, or "routed".

        Raises:
            LimeEdgeError: see `layers.check_mode` and `layers.fix_weights`.
        """
        check_mode(mode, self.variant)
        self.mode = mode
        self._switch(mode)

    def _switch(self, mode: Mode) -> None:
        for layer in self.layers.values():
            layer.use(mode)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for its own inputs (input_ids, attention_mask, pixel_values, ...), fp32.

        With a header, input_ids (B, T) alone: a prompt, without padding.
        """
        if not self.header:
            return self._call(dict(inputs)).logits.float()
        silent, acting = self._read(inputs["input_ids"])
        return acting.logits.float() if silent is None else torch.cat([silent.logits, acting.logits], 1).float()

    def _read(self, ids: Tensor) -> tuple[Any, Any]:
        """A prompt under the original model up to its header (None where there is nothing), then the header."""
        count, cache, before = max(0, ids.shape[1] - self.header), None, None
        if count:
            self._switch(None)
            before = self._call({"input_ids": ids[:, :count], "use_cache": True})
            cache = before.past_key_values
            self._switch(self.mode)
        return before, self._call({"input_ids": ids[:, count:], "past_key_values": cache, "use_cache": True})

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
        """Decode greedily with a cache: the whole prompt in one call, then one token a call.

        Args:
            input_ids: (B, T) int64; max_new_tokens: exactly so many are made, end of sequence or not.
            attention_mask: (B, T) or None.
        Returns:
            (B, T + max_new_tokens) int64, the prompt included.
        """
        tokens, step, cache = input_ids, input_ids, None
        for count in range(max_new_tokens):
            if self.header and count == 0:
                output = self._read(input_ids)[1]
                cache, step = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
                tokens = torch.cat([tokens, step], dim=1)
                continue
            inputs: dict[str, Any] = {"input_ids": step, "past_key_values": cache, "use_cache": True}
            if attention_mask is not None:
                inputs["attention_mask"] = attention_mask
                attention_mask = torch.cat([attention_mask, torch.ones_like(step[:, :1])], dim=1)
            output = self._call(inputs)
            cache = output.past_key_values
            step = output.logits[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, step], dim=1)
        return tokens

    def restore(self) -> nn.Module:
        """Put the original modules back and return the model."""
        for name, module in self.originals.items():
            self.model.set_submodule(name, module)
        return self.model

    def _call(self, inputs: dict[str, Any]) -> Any:
        for layer in self.layers.values():
            layer.attention_mask = inputs.get("attention_mask") if self.mask_padding else None
        return self.model(**inputs)


def make_layer(module: nn.Module, adapter: Mapping[str, Tensor], hyper: Mapping[str, object]) -> LimeLayer:
    """Build the unfolded layer of one site.

    Args:
        module: the nn.Linear or nn.Embedding that the site adapts.
        adapter: the site's tensors, as in `UnfoldedModel`.
        hyper: as in `UnfoldedModel`.
    Raises:
        LimeEdgeError: unknown variant, or hyper-parameters out of range.
    """
    variant, embedding = find_variant(hyper.get("variant")), isinstance(module, nn.Embedding)
    weight = module.get_parameter("weight")
    tensors = {name: tensor.to(weight) for name, tensor in adapter.items()}
    bias = getattr(module, "bias", None)
    if bias is not None:
        tensors.setdefault("bias", bias)
    if variant is SLICEFINE:
        tensors.setdefault("part_F", weight.narrow(*_rest_of(weight, tensors["part_T"], embedding)))
    else:
        tensors["weight"] = weight
    rank = tensors["A"].shape[0] if "A" in tensors else 1
    pad = hyper.get("pad_token_id")
    return LimeLayer(
        variant,
        tensors,
        read_alpha(hyper) / rank,
        variant.read_routing(hyper),
        embedding,
        pad if isinstance(pad, int) else None,
    )


def _rest_of(weight: Tensor, top: Tensor, embedding: bool) -> tuple[int, int, int]:
    axis = 1 if embedding else 0
    return axis, top.shape[axis], weight.shape[axis] - top.shape[axis]


def _is_plain(module: nn.Module | None) -> bool:
    """Subclasses with a forward of their own (a scaled embedding, say) are not what was adapted."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or (
        isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    )
