"""Free greedy answers of every task's own model, exact match: what examples/demo_adapter/evaluate.py measures."""

from __future__ import annotations

from collections import defaultdict

import torch
from data import GROUPS, HERE, TASKS
from evaluate import NEW_TOKENS, load_rows
from stacks import Stack
from torch import nn


@torch.no_grad()
def measure_tasks(
    model: nn.Module, choice: Stack, tokenizer, device: str, virtual: int = 0, limit: int | None = None
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Accuracy and answers of each task, answered by its own expert.

    Args:
        virtual: virtual tokens before each prompt, ids from the vocabulary's end on.
        limit: use the first inputs of each task only.
    """
    words = model.config.vocab_size
    accuracy, answers = {}, {}
    for tasks in GROUPS.values():
        rows = {task: load_rows(HERE / "eval", task, limit) for task in tasks}
        prompts = [row["prompt"] for row in rows[tasks[0]]]
        encoded = [
            [*range(words, words + virtual), *tokenizer(p, add_special_tokens=False)["input_ids"]] for p in prompts
        ]
        buckets: dict[int, list[int]] = defaultdict(list)  # prompts of one length: no padding anywhere
        for index, ids in enumerate(encoded):
            buckets[len(ids)].append(index)
        found = {task: [""] * len(prompts) for task in tasks}
        for indices in buckets.values():
            ids = torch.tensor([encoded[i] for i in indices], device=device)
            experts = torch.tensor([TASKS.index(task) for task in tasks], device=device)
            new = continue_greedily(
                model, choice, ids.repeat(len(tasks), 1), experts.repeat_interleave(len(ids)), tokenizer
            )
            for task, part in zip(tasks, new.split(len(ids)), strict=True):
                for index, tokens in zip(indices, part.tolist(), strict=True):
                    found[task][index] = read_answer(tokens, tokenizer)
        for task in tasks:
            answers[task] = found[task]
            right = [f == row["answer"] for f, row in zip(found[task], rows[task], strict=True)]
            accuracy[task] = round(sum(right) / len(right), 4)
    return accuracy, answers


def read_answer(tokens: list[int], tokenizer) -> str:
    """The text up to the end token, stripped."""
    end = tokenizer.eos_token_id
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False).strip()


def continue_greedily(
    model: nn.Module, choice: Stack, ids: torch.Tensor, experts: torch.Tensor, tokenizer
) -> torch.Tensor:
    """Up to NEW_TOKENS new tokens (N, S) after prompts of one length ids (N, T); experts (N,) sorted."""
    choice.rows = experts
    step, cache, new = ids, None, []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(NEW_TOKENS):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
        new.append(step)
        ended |= step[:, 0] == tokenizer.eos_token_id
        if ended.all():
            break
    return torch.cat(new, 1)
