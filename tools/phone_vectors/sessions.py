"""What Python's sessions answer: logits, generations, and scripts of calls with what the cache holds after each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge.bundle.experts import describe_selection, parse_selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.generate import GenerationOptions

TEXTS = ("Write the plural of patent.", "<|im_start|>user\nhow late is it?<|im_end|>\n<|im_start|>assistant\n")
SELECTIONS = ("expert0", "expert1", "expert3", "none", "expert0=0.7,expert2=0.5,expert3=-0.2", "routed")
NEW = 12
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"max_new_tokens": 3},
    {"ignore_eos": True},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 2**64 - 1, "ignore_eos": True},
    {"temperature": 1.5, "top_p": 0.5, "seed": 3, "stop": ["e", "th"]},
)


def record_decoder(path: Path) -> dict[str, Any]:
    """Everything that one language model's bundle is asked."""
    session = lime_edge.open_decoder(path, threads=1)
    random, opens_with = np.random.default_rng(5), describe_selection(session.selection)
    prompts = [random.integers(3, session.bundle.manifest.backbone.vocab, count).tolist() for count in (1, 7, 24)]
    allowed = [text for text in SELECTIONS if _takes(session, text)]
    return {
        "experts": list(session.experts),
        "opens_with": opens_with,
        "allowed": allowed,
        "refused": [
            text for text in (*SELECTIONS, "nobody", "expert0=0.5", "expert0=0.5,nobody=0.5") if text not in allowed
        ],
        "logits": [_record_logits(session, text, ids) for text in allowed for ids in prompts],
        "generations": [
            _record_generation(session, text, prompt, options)
            for text in allowed
            for prompt in (*TEXTS, prompts[2])
            for options in OPTIONS
        ],
        "script": record_script(session, [text for text in allowed if text != "routed"], prompts[1:]),
        "many": record_many(path, allowed),
    }


def _takes(session: Session, text: str) -> bool:
    try:
        session.use(parse_selection(text))
    except LimeEdgeError:
        return False
    return True


def _record_logits(session: Session, text: str, ids: list[int]) -> dict[str, Any]:
    session.use(parse_selection(text))
    return {"selection": text, "ids": ids, "logits": session.logits(ids).tolist()}


def _record_generation(session: Session, text: str, prompt: Any, options: dict[str, Any]) -> dict[str, Any]:
    session.use(parse_selection(text))
    chosen = read_options(options)
    found: dict[str, Any] = {"selection": text, "options": tell_options(options)}
    if isinstance(prompt, str):
        pieces = list(session.generate(prompt, chosen))
        return found | {
            "prompt": prompt,
            "ids": session.codec.encode(prompt),
            "pieces": pieces,
            "finish": session.finish_reason,
        }
    return found | {
        "ids": prompt,
        "tokens": list(session.generate_ids(prompt, chosen)),
        "finish": session.finish_reason,
    }


def record_script(session: Session, selections: list[str], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """A sequence of calls; after each what the cache holds, and its last logits where it gave some."""
    steps: list[dict[str, Any]] = []

    def note(step: dict[str, Any], logits: np.ndarray | None = None) -> None:
        cache = [[segment.selection, segment.tokens] for segment in session.cache]
        steps.append(step | {"cache": cache, "last": None if logits is None else logits[-1].tolist()})

    first, second = (selections * 2)[:2]
    session.reset()
    note({"do": "reset"})
    for keep, text in ((False, first), (False, first), (True, second), (False, second), (True, first), (False, second)):
        session.use(parse_selection(text), keep_cache=keep)
        note({"do": "use", "selection": text, "keep_cache": keep})
        note({"do": "extend", "ids": prompts[0]}, session.extend(prompts[0]))
    ids = prompts[1]
    for keep, prompt in (
        (False, ids),
        (True, ids + [9, 8, 7]),
        (True, ids[:10] + [4, 5, 6]),
        (True, ids[:2]),
        (False, ids),
    ):
        tokens = list(
            session.generate_ids(prompt, GenerationOptions(max_new_tokens=4, ignore_eos=True), keep_cache=keep)
        )
        note({"do": "generate", "ids": prompt, "keep_cache": keep, "tokens": tokens})
    full = session.max_length - len(ids)
    tokens = list(session.generate_ids(ids, GenerationOptions(max_new_tokens=1000, ignore_eos=True)))
    assert session.finish_reason == "cache" and len(tokens) == full
    note({"do": "fill", "ids": ids, "tokens": tokens})
    return steps


def record_many(path: Path, allowed: list[str]) -> list[dict[str, Any]]:
    """Requests answered together, fewer rows than requests: every token in the order it came, and why each ended."""
    found = []
    for rows, as_text in ((3, False), (5, True)):
        session = lime_edge.open_decoder(path, threads=1)
        random, asked = np.random.default_rng(8), []
        begin = random.integers(3, session.bundle.manifest.backbone.vocab, 12).tolist()
        for number, text in enumerate((allowed * 3)[: max(6, len(allowed))]):
            own = random.integers(3, session.bundle.manifest.backbone.vocab, 2 + 3 * (number % 3)).tolist()
            prompt = begin + own if number % 2 == 0 else own  # some share a beginning, under the same expert or another
            asked.append((text, TEXTS[number % 2] if as_text else prompt, OPTIONS[number % len(OPTIONS)]))
        requests = [(prompt, parse_selection(text), read_options(options)) for text, prompt, options in asked]
        run = session.generate_many if as_text else session.generate_many_ids
        answers = run(requests, rows=rows)
        events = [[row, piece] for row, piece in answers]
        asked_for = [
            {"selection": text, "prompt": prompt, "options": tell_options(options)} for text, prompt, options in asked
        ]
        reasons = [answers.reasons[number] for number in range(len(asked))]
        found.append({"rows": rows, "requests": asked_for, "events": events, "reasons": reasons})
    return found


def read_options(options: dict[str, Any]) -> GenerationOptions:
    """Options of a case."""
    return GenerationOptions(**({"max_new_tokens": NEW} | options | {"stop": tuple(options.get("stop", ()))}))


def tell_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same for a reader whose JSON holds no integers of 64 bits."""
    told = {"max_new_tokens": NEW} | options
    return told | {"seed": str(told["seed"])} if "seed" in told else told


def record_encoder(path: Path) -> dict[str, Any]:
    """Everything that an encoder's bundle is asked."""
    session = lime_edge.open_encoder(path, threads=1)
    random = np.random.default_rng(6)
    names = session.experts
    selections = [*names[:2], f"{names[0]}=0.25,{names[1]}=0.75", "none", "routed"]
    cases = []
    for text in selections:
        try:
            session.use(parse_selection(text))
        except LimeEdgeError:
            continue
        for batch, length in ((1, 9), (3, 5)):
            inputs = _draw_inputs(session, random, batch, length)
            outputs = session.run(**inputs)
            cases.append(
                {
                    "selection": text,
                    "inputs": {name: _write_array(array) for name, array in inputs.items()},
                    "outputs": {name: _write_array(array) for name, array in outputs.items()},
                }
            )
    return {"experts": list(names), "cases": cases}


def _draw_inputs(
    session: EncoderSession, random: np.random.Generator, batch: int, length: int
) -> dict[str, np.ndarray]:
    """What must be given; what may be left out is left out."""
    sizes, found = {"batch": batch, "sequence": length}, {}
    for entry in session._facts.inputs:
        if entry.default:
            continue
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in entry.shape]
        if entry.dtype == "int64":
            found[entry.name] = random.integers(0, entry.limit, shape)
        else:
            found[entry.name] = random.standard_normal(shape).astype(np.float32)
    return found


def _write_array(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "values": array.ravel().tolist()}


def record_demo(path: Path) -> list[dict[str, Any]]:
    """Greedy answers of every skill, and of the original model, to a few texts."""
    session, cases = lime_edge.open_decoder(path, threads=1), []
    for text in ("patent", "How late is it?", "the wonderful film was far too long"):
        prompt = session.codec.render_chat([{"role": "user", "content": text}])
        for selection in (*session.experts, "none"):
            session.use(parse_selection(selection))
            ids = session.codec.encode(prompt)
            tokens = list(session.generate_ids(ids, GenerationOptions(max_new_tokens=16)))
            cases.append({"selection": selection, "text": text, "ids": ids, "tokens": tokens})
    return cases
