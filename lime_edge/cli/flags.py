"""From the library's words to the command line's: errors name parameters, people type options."""

from __future__ import annotations

import re

from lime_edge.targets.entries import TARGETS
from lime_edge.targets.target import list_by_name

FLAGS = {  # parameter -> the option it is set with; what has no option keeps its name
    "adapter": "--adapter",
    "allow_install": "--allow-install",
    "any_backbone": "--any-backbone",
    "baseline": "--baseline",
    "batch": "--batch",
    "bits": "--bits",
    "bundle": "--bundle",
    "calibration": "--calibration",
    "companion": "--companion",
    "data": "--data",
    "default": "--default",
    "depth": "--depth",
    "device": "--device",
    "expert": "--expert",
    "experts": "--experts",
    "fold": "--fold",
    "force": "--force",
    "form": "--format",
    "gen_tokens": "--gen-tokens",
    "grace": "--grace",
    "group": "--group-size",
    "hosts": "--hosts",
    "hyper": "--hyper",
    "keep_installed": "--keep-installed",
    "keep_int8": "--keep-int8",
    "limit": "--limit",
    "max_length": "--max-length",
    "max_new_tokens": "--max-new-tokens",
    "model": "--model",
    "most_body": "--max-body",
    "most_tokens": "--max-tokens",
    "most_waiting": "--max-waiting",
    "name": "--name",
    "names": "--names",
    "output": "--output",
    "port": "--port",
    "prefixes": "--prefix-memory",
    "prompt_tokens": "--prompt-tokens",
    "python": "--python",
    "quant": "--quant",
    "raw": "--raw",
    "repeat": "--repeat",
    "report": "--report",
    "rounding": "--rounding",
    "rows": "--rows",
    "seed": "--seed",
    "settings": "--set",
    "site_packages": "--site-packages",
    "size": "--size",
    "single": "--single",
    "stop": "--stop",
    "system": "--system",
    "target": "--target",
    "targets": "--target",
    "temperature": "--temperature",
    "threads": "--threads",
    "tokenizer": "--tokenizer",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "verify": "--verify",
    "wheels": "--wheels",
} | {name: f"--{name.replace('_', '-')}" for name in list_by_name(TARGETS)}
PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


def translate(text: str) -> str:
    """Parameters in backticks as options: `quant` to --quant, `force=True` to --force, `fold=movie` to --fold movie."""
    return PARAMETER.sub(_translate_one, text)


def _translate_one(found: re.Match[str]) -> str:
    name, value = found.groups()
    flag = FLAGS.get(name)
    if flag is None:
        return found.group()
    if value in (None, "True"):
        return flag
    if value == "False":
        return f"--no-{flag[2:]}"
    return f"{flag} {value.strip(chr(34) + chr(39))}"
