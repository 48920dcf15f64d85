"""examples/table1: 16 models in one are the same as 16 models, whatever the method."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
FOLDERS = [str(Path(__file__).parents[1] / "examples" / name) for name in ("demo_adapter", "table1")]
NAMES = ("data", "evaluate", "lime_layers", "sentences", "tasks", "train", "words")
OWN = ("answers", "integers", "learn", "methods", "stacks")
TASKS, ROWS, LENGTH = 3, 2, 6


@pytest.fixture(scope="module")
def code() -> Iterator[Any]:
    """The example's modules, which import each other by their bare names."""
    import importlib

    sys.path[:0] = FOLDERS
    saved: dict[str, Any] = {name: sys.modules.pop(name, None) for name in (*NAMES, *OWN)}
    yield type("Code", (), {name: importlib.import_module(name) for name in (*OWN, "train", "lime_layers")})
    for name in (*NAMES, *OWN):
        sys.modules.pop(name, None)
        if saved[name] is not None:
            sys.modules[name] = saved[name]
    for folder in FOLDERS:
        sys.path.remove(folder)


def make_backbone() -> Any:
    """A tiny tied Llama; norms that are not all one."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_corpus(code: Any) -> Any:
    """Random rows of three tasks, of several lengths."""
    torch.manual_seed(4)
    expert = torch.arange(TASKS).repeat_interleave(4)
    length = torch.tensor([LENGTH - i % 2 for i in range(len(expert))])
    ids = torch.randint(90, (len(expert), LENGTH))
    by_task = [torch.nonzero(expert == e).flatten() for e in range(TASKS)]
    return code.train.Corpus(ids, torch.full_like(length, 3), length, expert, by_task)


def test_full_is_as_many_models(code: Any) -> None:
    """Each task's loss and gradients are those of a model of its own, trained on its rows alone."""
    base, corpus = make_backbone(), make_corpus(code)
    stacked = copy.deepcopy(base)
    choice = code.methods.put_full(stacked, TASKS)
    for parameter in stacked.parameters():  # other weights in every task
        parameter.data += 0.05 * torch.randn_like(parameter)
    (losses, _), right = code.learn.measure_rows(stacked, choice, corpus, torch.arange(12), "cpu")
    losses.sum().backward()
    for task in range(TASKS):
        alone = copy.deepcopy(base)
        names = dict(alone.named_parameters())
        for name, parameter in stacked.named_parameters():
            names[name].data.copy_(parameter.data[task])
        rows = corpus.by_task[task]
        ids = corpus.ids[rows, : int(corpus.length[rows].max())]
        logits = alone(input_ids=ids).logits
        places = torch.arange(ids.shape[1] - 1)
        wanted = (places >= 2) & (places < corpus.length[rows][:, None] - 1)
        loss = F.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])
        loss.backward()
        assert torch.allclose(losses[task], loss, atol=1e-5), (task, losses[task], loss)
        for name, parameter in stacked.named_parameters():
            found, exact = parameter.grad[task], names[name].grad
            assert exact.abs().max() > 0 and torch.allclose(found, exact, atol=1e-4), (task, name)
        said = (logits[:, :-1].argmax(-1) == ids[:, 1:]) | ~wanted
        assert torch.equal(right[rows], said.all(1))


def test_loras_are_merged_models(code: Any) -> None:
    """A LoRA beside the backbone answers as the weights that it is merged into; each row with its own."""
    base = make_backbone()
    model = copy.deepcopy(base)
    choice = code.methods.put_lora(4)(model, TASKS)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(90, (ROWS, LENGTH)).repeat(TASKS, 1)
    choice.rows = torch.arange(TASKS).repeat_interleave(ROWS)
    beside = model(input_ids=ids).logits
    for task in range(TASKS):
        merged = copy.deepcopy(base)
        for name, module in model.named_modules():
            if isinstance(module, code.stacks.StackedLora):
                merged.get_submodule(name).weight.data += 2.0 * module.B.data[task] @ module.A.data[task]
        rows = slice(task * ROWS, (task + 1) * ROWS)
        assert torch.allclose(beside[rows], merged(input_ids=ids[rows]).logits, atol=1e-4), task
    code.integers.merge_loras(model)
    assert torch.allclose(model(input_ids=ids).logits, beside, atol=1e-4)
    choice.rows = torch.tensor([0, 1, 0, 1, 2, 2])
    with pytest.raises(ValueError, match="sorted"):
        model(input_ids=ids)


def test_prompts_stand_before_the_row(code: Any) -> None:
    """Virtual tokens are the embeddings of their task, before the row's own."""
    base = make_backbone()
    model = copy.deepcopy(base)
    choice = code.methods.put_prompts(model, TASKS)
    prompts = model.model.embed_tokens.prompts
    prompts.data += torch.randn_like(prompts)
    ids = torch.randint(90, (TASKS, LENGTH))
    virtual = torch.arange(90, 90 + code.methods.VIRTUAL_TOKENS).expand(TASKS, -1)
    choice.rows = torch.arange(TASKS)
    found = model(input_ids=torch.cat([virtual, ids], 1)).logits[:, -LENGTH:]
    embedded = torch.cat([prompts, base.model.embed_tokens(ids)], 1)
    assert torch.allclose(found, base(inputs_embeds=embedded).logits[:, -LENGTH:], atol=1e-4)


def test_folded_vectors_are_the_same_experts(code: Any) -> None:
    """Folding the mean expert changes no expert's answer; rounding the folded weights does, a little."""
    model = make_backbone()
    choice = code.methods.put_lime(4)(model, TASKS)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    choice.rows, ids = torch.arange(TASKS), torch.randint(90, (TASKS, LENGTH))
    before = model(input_ids=ids).logits
    code.integers.fold_vectors(model)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    size = code.integers.round_backbone(model, ("head", "qkv", "down"), "cpu")
    rounded = model(input_ids=ids).logits
    assert 0 < (rounded - before).abs().max() < before.abs().max()
    per_layer = 64 * 64 + 2 * 32 * 64 + 64 * 96  # q, k, v and down at a byte, with two of scale a row
    narrow = 64 * 64 + 2 * 96 * 64  # o, gate and up at half a byte, with two of scale a group of 32
    assert size == 90 * 66 + 2 * (per_layer + 2 * (64 + 64 + 64) + narrow // 2 + narrow // 16)


@pytest.mark.parametrize("name", ["full", "lora64", "moelora", "lime", "prompt"])
def test_every_method_learns_and_counts(code: Any, name: str) -> None:
    """A few steps lower every task's loss, and only what is said to be trained changes."""
    base, corpus, method = make_backbone(), make_corpus(code), code.methods.METHODS[name]
    corpus = code.learn.add_virtual(corpus, method.virtual, 90)
    model, choice = code.learn.put_anew(base, method, TASKS, 1, "cpu")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rows = torch.arange(12)
    (start, _), _ = code.learn.measure_rows(model, choice, corpus, rows, "cpu")
    rates = (1e-2, 1e-2) if name != "prompt" else (1e-1, 0.0)
    plan = code.train.Plan(steps=12, batch=12, warmup=2)
    code.learn.fit(model, choice, method, rates, corpus, plan, "cpu")
    (end, _), _ = code.learn.measure_rows(model, choice, corpus, rows, "cpu")
    assert (end < start).all(), (start, end)
    own, shared = code.methods.split_trained(model)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == own.keys() | shared.keys()
    counted = code.methods.count_parameters(model, TASKS)
    sums = {
        "full": sum(p.numel() for p in base.parameters()),
        "lora64": 2 * 64 * (128 + 96 + 96 + 128),
        "moelora": 2 * 8 * (128 + 96 + 96 + 128),
        "lime": 2 * (64 + 32 + 32 + 64),
        "prompt": code.methods.VIRTUAL_TOKENS * 64,
    }
    assert counted == {"per_expert": sums[name], "shared": 2 * 8 * (128 + 96 + 96 + 128) if name == "lime" else 0}


def test_the_page_is_what_the_numbers_say() -> None:
    """docs/table1.md is what the tool writes of table1.json; parameters are those of the model's shape."""
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root / "tools"))
    import table1_page

    data = json.loads((root / "docs" / "table1.json").read_text())
    assert (root / "docs" / "table1.md").read_text() == table1_page.render(data, table1_page.read("accuracy.json"))
    width, keys, layers = 576, 192, 30
    ranks = layers * (4 * width + 2 * (width + keys))  # of one rank: q and o, k and v
    assert {name: found["parameters"] for name, found in data["methods"].items()} == {
        "full": {"per_expert": table1_page.BACKBONE, "shared": 0},
        "lora64": {"per_expert": 64 * ranks, "shared": 0},
        "moelora": {"per_expert": 8 * ranks, "shared": 0},
        "lime": {"per_expert": layers * 2 * (width + keys), "shared": 8 * ranks},
        "prompt": {"per_expert": 20 * width, "shared": 0},
    }
    for found in data["methods"].values():
        for facts in found["accuracy"].values():
            assert len(facts["tasks"]) == 16
            assert facts["mean"] == pytest.approx(sum(facts["tasks"].values()) / 16, abs=1e-4)


def test_clipping_is_per_task(code: Any) -> None:
    """A task's loud gradient leaves its neighbours' as they are."""
    loud, quiet = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    loud.grad, quiet.grad = torch.tensor([[3.0, 0, 0], [0.1, 0, 0]]), torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0.1]])
    code.learn.clip_per_task([loud, quiet], [], True)
    assert torch.allclose(loud.grad, torch.tensor([[0.6, 0, 0], [0.1, 0, 0]]))
    assert torch.allclose(quiet.grad, torch.tensor([[0.8, 0, 0, 0], [0, 0, 0, 0.1]]))
