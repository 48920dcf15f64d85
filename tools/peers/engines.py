"""The engines that are compared, each behind the same six verbs. Imported in a child process only.

start: a new sequence, up to the logits of the prompt's last token. step: take the likeliest token and run it.
switch: use expert number `index` from now on. peek: the logits that `start` or `step` left, (V,) float32.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Spec = dict[str, Any]


class Peer(Protocol):
    """One loaded engine; `experts` is how many can be switched between."""

    experts: int

    def start(self, ids: list[int]) -> None:
        """Run a prompt in an empty cache."""

    def step(self) -> int:
        """The likeliest next token, run: one decode step. Returns the token."""

    def switch(self, index: int) -> None:
        """Use another expert from the next call on."""

    def peek(self) -> np.ndarray:
        """Logits of the last position (V,) float32."""


class Ours:
    """A bundle in a session. spec: path, engine, selection (None keeps the session's), threads, capacity."""

    def __init__(self, spec: Spec):
        from lime_edge.bundle.bundle import Bundle
        from lime_edge.session.engines import SessionOptions
        from lime_edge.session.open import open_decoder

        options = SessionOptions(spec["threads"], spec["capacity"])
        target = "onnx" if spec["engine"] == "ours" else spec["engine"]
        self.session = open_decoder(Bundle.open(spec["path"]), target, options)
        if spec.get("selection"):
            self.session.use(spec["selection"])
        self.experts = len(self.session.experts)
        self.row = np.empty(0, np.float32)

    def start(self, ids: list[int]) -> None:
        self.row = self.session.logits(ids, keep=1)[-1]

    def step(self) -> int:
        token = int(self.row.argmax())
        self.row = self.session.extend([token])[-1]
        return token

    def switch(self, index: int) -> None:
        self.session.use(self.session.experts[index])

    def peek(self) -> np.ndarray:
        return np.array(self.row)


class GenAI:
    """An ONNX Runtime GenAI directory. spec: path, adapters (files), active (index or None), threads, capacity."""

    def __init__(self, spec: Spec):
        import json

        import onnxruntime_genai as og

        config = og.Config(spec["path"])
        options = {"intra_op_num_threads": spec["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.adapters = og.Adapters(self.model)
        for index, file in enumerate(spec.get("adapters", [])):
            self.adapters.load(file, str(index))
        self.experts = len(spec.get("adapters", []))
        parameters = og.GeneratorParams(self.model)
        # min_length: an end token must not end a round
        parameters.set_search_options(max_length=spec["capacity"], min_length=spec["capacity"], do_sample=False)
        self.generator = og.Generator(self.model, parameters)
        if spec.get("active") is not None:
            self.switch(spec["active"])

    def start(self, ids: list[int]) -> None:
        if self.generator.token_count():
            self.generator.rewind_to(0)
        self.generator.append_tokens(np.array(ids, np.int32))
        self.row = np.array(self.generator.get_logits()).reshape(-1)
        self.generator.generate_next_token()  # takes a token of the prompt's logits; runs nothing yet

    def step(self) -> int:
        self.generator.generate_next_token()  # runs the token that was taken, and takes the next
        return int(self.generator.get_next_tokens()[0])

    def switch(self, index: int) -> None:
        self.generator.set_active_adapter(self.adapters, str(index))

    def peek(self) -> np.ndarray:
        return self.row


class LlamaCpp:
    """A GGUF file. spec: path, adapters (GGUF LoRA files), active (index or None), threads, capacity."""

    def __init__(self, spec: Spec):
        import llama_cpp

        self.api = llama_cpp
        silence_llama()
        load_llama_backends()
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(spec["path"]).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {spec['path']}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = spec["capacity"]
        context.n_threads = context.n_threads_batch = spec["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        files = [str(file).encode() for file in spec.get("adapters", [])]
        self.adapters = [llama_cpp.llama_adapter_lora_init(self.model, file) for file in files]
        if not self.context or not all(self.adapters):
            raise RuntimeError("llama.cpp cannot make a context or load a LoRA")
        self.experts = len(self.adapters)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        if spec.get("active") is not None:
            self.switch(spec["active"])

    def _decode(self, ids: list[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        self.row = np.ctypeslib.as_array(pointer, (self.vocab,))

    def start(self, ids: list[int]) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self._decode(ids)

    def step(self) -> int:
        token = int(self.row.argmax())
        self._decode([token])
        return token

    def switch(self, index: int) -> None:
        one = (self.api.llama_adapter_lora_p_ctypes * 1)(self.adapters[index])
        self.api.llama_set_adapters_lora(self.context, one, 1, (ctypes.c_float * 1)(1.0))

    def peek(self) -> np.ndarray:
        return np.array(self.row)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.api.llama_free(self.context)
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)


def silence_llama() -> None:
    """Keep llama.cpp's loading log off standard error."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    silence_llama.callback = quiet  # type: ignore[attr-defined] # llama.cpp holds a bare pointer to it
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


def load_llama_backends() -> None:
    """Load the CPU code that fits this processor, where llama.cpp was built with several of them."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    if any(folder.glob("libggml-cpu-*.so")):
        library = ctypes.CDLL("libggml.so.0")  # the one that llama_cpp has loaded
        library.ggml_backend_load_all_from_path(str(folder).encode())


class Torch:
    """`transformers` in float32, with PEFT where there are adapters. spec: path, adapters (directories), active."""

    def __init__(self, spec: Spec):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(spec["threads"])
        self.torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(spec["path"], dtype=torch.float32, local_files_only=True)
        folders = spec.get("adapters", [])
        if folders:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
            for index, folder in enumerate(folders[1:], 1):
                model.load_adapter(folder, adapter_name=str(index))
        self.model, self.experts = model.eval(), len(folders)
        self.cache: Any = None
        if spec.get("active") is not None:
            self.switch(spec["active"])

    def _run(self, ids: list[int]) -> None:
        with self.torch.inference_mode():
            out = self.model(
                input_ids=self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache, self.row = out.past_key_values, out.logits[0, -1]

    def start(self, ids: list[int]) -> None:
        self.cache = None
        self._run(ids)

    def step(self) -> int:
        token = int(self.row.argmax())
        self._run([token])
        return token

    def switch(self, index: int) -> None:
        self.model.set_adapter(str(index))

    def peek(self) -> np.ndarray:
        return self.row.float().numpy()


def open_peer(spec: Spec) -> Peer:
    """Load what a spec describes."""
    from methods import LoraGraph, PromptGraph

    kinds: dict[str, Callable[[Spec], Peer]] = {
        "ours": Ours,
        "executorch": Ours,
        "genai": GenAI,
        "llama": LlamaCpp,
        "torch": Torch,
        "lora": LoraGraph,
        "prompt": PromptGraph,
    }
    gc.collect()
    return kinds[spec["engine"]](spec)
