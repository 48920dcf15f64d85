"""Vision-language families: where each keeps language model, tower and projector; who cannot be read, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.errors import Faults

FEATURES = "image_features"  # the tower's output: what takes the placeholders' place
MROPE = "its text positions are rotated in three sections (mrope), one each for time, height and width"
# config.json's model_type -> why not
REFUSED = {
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen3_vl": MROPE,
    "qwen3_vl_moe": MROPE,
    "qwen2_5_omni": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": MROPE,
    "fast_vlm": "its tower (FastViTHD) is a convolutional network of timm's, not a transformer of linear layers",
    "llava_qwen2": "its tower (FastViTHD) is a convolutional network of timm's, not a transformer of linear layers",
    "mllama": "its text layers look at the image by cross-attention: there are no rows to replace",
    "paligemma": "image rows look at each other in both directions, which the cached decoder does not do",
}


class LlavaTower(nn.Module):
    """LLaVA-OneVision's SigLIP tower and its projector, under their names in the whole model.

    Source: transformers 5.23, LlavaOnevisionModel.get_image_features: the projector reads the last layer's output,
    before `post_layernorm`.
    """

    def __init__(self, config: Any):
        super().__init__()
        from transformers import AutoModel
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

        self.config = config.vision_config
        self.model = nn.Module()
        self.model.vision_tower = AutoModel.from_config(config.vision_config)
        self.model.multi_modal_projector = LlavaOnevisionMultiModalProjector(config)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values (tiles, 3, S, S) float32; features (tiles, patches, hidden)."""
        tower: Any = self.model.vision_tower
        hidden = tower.embeddings(pixel_values)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        return {FEATURES: self.model.multi_modal_projector(hidden)}  # type: ignore[operator]


class SmolTower(nn.Module):
    """SmolVLM's (and Idefics3's) tower and connector, for whole tiles: no patch is padding.

    Source: transformers 5.23, SmolVLMModel.get_image_features: the connector reads the output of `post_layernorm`.
    """

    def __init__(self, config: Any):
        super().__init__()
        if config.model_type == "smolvlm":
            from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

            tower, connector = SmolVLMVisionTransformer, SmolVLMConnector
        else:
            from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer

            tower, connector = Idefics3VisionTransformer, Idefics3Connector
        self.config = config.vision_config
        self.model = nn.Module()
        self.model.vision_model = tower(config.vision_config)
        self.model.connector = connector(config)
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.register_buffer("places", place_patches(side), persistent=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values (tiles, 3, S, S) float32; features (tiles, patches / scale^2, hidden)."""
        tower: Any = self.model.vision_model
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(self.get_buffer("places"))
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        return {FEATURES: self.model.connector(tower.post_layernorm(hidden))}  # type: ignore[operator]


def place_patches(side: int) -> Tensor:
    """Which row of the position table each patch of a whole tile gets: (side * side,) int64.

    Fractions are sorted into buckets in float32, so that some patches may share a row: as they were trained.

    Source: transformers 5.23, SmolVLMVisionEmbeddings.forward.
    """
    limits = torch.arange(1 / side, 1.0, 1 / side)
    places = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))).clamp(max=1.0 - 1e-6)
    buckets = torch.bucketize(places, limits, right=True)
    return (buckets[:, None] * side + buckets[None]).flatten()


@dataclass(frozen=True)
class VisionFamily:
    """One family.

    Attributes:
        stem: what the names of the language model begin with. newline: of the row that ends a line of tiles, or None.
        respell: beginnings of names in other versions of transformers, and theirs here; the first that fits.
        ignored: beginnings of tensors that nothing reads. tower: builds tower and projector.
        image_tokens: the config's fields of the placeholders' ids.
        check: notes what of a config is not supported.
    """

    stem: str
    newline: str | None
    respell: Mapping[str, str]
    ignored: tuple[str, ...]
    tower: Callable[[Any], nn.Module]
    image_tokens: tuple[str, ...]
    check: Callable[[Any, Faults], None]

    def spell(self, name: str) -> str:
        """A tensor's or module's name as the module tree of transformers 5 has it."""
        for old, new in self.respell.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def check_llava(config: Any, faults: Faults) -> None:
    """A SigLIP tower whose last layer the projector reads, and grids of whole tiles."""
    vision = config.vision_config
    if vision.model_type != "siglip_vision_model":
        faults.add("config.json: vision_config.model_type", "siglip_vision_model", vision.model_type)
        return
    if config.vision_feature_layer != -1:
        faults.add("config.json: vision_feature_layer", -1, config.vision_feature_layer)
    if config.vision_feature_select_strategy != "full":
        faults.add("config.json: vision_feature_select_strategy", "full", config.vision_feature_select_strategy)
    ratio = str(config.vision_aspect_ratio)
    if not (ratio.startswith("anyres_max_") and ratio.removeprefix("anyres_max_").isdigit()):
        faults.add("config.json: vision_aspect_ratio", "anyres_max_ and a number", ratio)
    for grid in config.image_grid_pinpoints:
        if len(grid) != 2 or any(not isinstance(side, int) or side < 1 or side % vision.image_size for side in grid):
            faults.add("config.json: image_grid_pinpoints", f"multiples of {vision.image_size}", grid)
            return


def check_smol(config: Any, faults: Faults) -> None:
    """A tile whose patches the pixel shuffle divides."""
    side, scale = config.vision_config.image_size // config.vision_config.patch_size, config.scale_factor
    if not isinstance(scale, int) or scale < 1 or side % scale:
        faults.add("config.json: scale_factor", f"a divisor of {side}", scale)


LLAVA = VisionFamily(
    stem="model.language_model",
    newline="model.image_newline",
    respell={
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.vision_model.": "model.vision_tower.",
        "model.vision_tower.vision_model.": "model.vision_tower.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    ignored=("model.vision_tower.head.",),
    tower=LlavaTower,
    image_tokens=("image_token_id", "video_token_id"),
    check=check_llava,
)
SMOL = VisionFamily(
    stem="model.text_model",
    newline=None,
    respell={},
    ignored=(),
    tower=SmolTower,
    image_tokens=("image_token_id",),
    check=check_smol,
)
VISION_FAMILIES = {"llava_onevision": LLAVA, "smolvlm": SMOL, "idefics3": SMOL}
