"""One model, several skills, on a Raspberry Pi: what the board is doing, the same prompt for every expert, speeds.

    pip install 'lime-edge[onnx]'
    python demo.py smollm2.lime
    python demo.py smollm2.lime --prompt "patent" --experts plural,past,gerund --install new-skill.safetensors
    python demo.py smollm2.lime --bench > bench.json

It runs on any Linux computer; what a computer cannot tell is said to be unknown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import lime_edge
from lime_edge.bench.measure import BenchOptions, bench_bundle, time_switches
from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

# Bits of `vcgencmd get_throttled`; the same ones shifted by 16 mean "has happened since the start".
THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


@dataclass(frozen=True)
class Answer:
    """What one expert wrote, and how fast: of the prompt's first token and of the ones after it."""

    text: str
    first_ms: float
    tokens_per_s: float


def read_text(file: Path) -> str | None:
    """The text of a file of /sys or /proc, or None."""
    try:
        return file.read_text().strip("\0\n ") or None
    except OSError:
        return None


def describe_board(root: Path = Path("/")) -> dict[str, str]:
    """What the board says about itself; "unknown (FILE)" where it says nothing."""
    clock = root / "sys/devices/system/cpu/cpu0/cpufreq"
    files = {
        "board": root / "proc/device-tree/model",
        "temperature": root / "sys/class/thermal/thermal_zone0/temp",  # thousandths of a degree
        "governor": clock / "scaling_governor",
        "clock": clock / "scaling_cur_freq",  # kHz
    }
    facts = {name: read_text(file) for name, file in files.items()}
    if facts["temperature"]:
        facts["temperature"] = f"{int(facts['temperature']) / 1000:.1f} C"
    if facts["clock"]:
        facts["clock"] = f"{int(facts['clock']) / 1000:.0f} MHz"
    known = {name: value or f"unknown ({files[name]})" for name, value in facts.items()}
    return known | {"power": read_throttling()}


def read_throttling() -> str:
    """What the firmware says about voltage and heat, in words."""
    if not shutil.which("vcgencmd"):
        return "unknown (vcgencmd is not here)"
    done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True)
    _, _, number = done.stdout.strip().partition("=")
    if done.returncode or not number:
        return f"unknown (vcgencmd: {(done.stderr or done.stdout).strip()})"
    bits = int(number, 16)
    now = [word for bit, word in THROTTLED.items() if bits >> bit & 1]
    before = [f"{word} earlier" for bit, word in THROTTLED.items() if bits >> bit + 16 & 1]
    return ", ".join(now + before) or "good"


def switch(session: Session, name: str) -> float:
    """Microseconds of switching to an expert, the start of a new cache included."""
    begin = time.perf_counter()
    session.use(name)
    return (time.perf_counter() - begin) * 1e6


def answer(session: Session, prompt: str, count: int) -> Answer:
    """Answer greedily with the expert in use; `count` tokens at most."""
    tokens, stamps = [], [time.perf_counter()]
    for token in session.generate_ids(prompt, GenerationOptions(max_new_tokens=count)):
        tokens.append(token)
        stamps.append(time.perf_counter())
    if not tokens:
        return Answer("", 0.0, 0.0)
    seconds = stamps[-1] - stamps[1]
    speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else 0.0
    return Answer(session.codec.decode(tokens).strip(), (stamps[1] - stamps[0]) * 1e3, speed)


def show(session: Session, name: str, prompt: str, count: int) -> None:
    """Switch to an expert, answer, and print one line."""
    took = switch(session, name)
    got = answer(session, prompt, count)
    speed = f"{got.tokens_per_s:6.1f} tokens/s" if got.tokens_per_s else "       one token"
    print(
        f"{name:<16} switch {took:6.1f} us   first token {got.first_ms:7.1f} ms   {speed}   {got.text!r}",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """The demonstration."""
    begin = time.perf_counter()
    session = lime_edge.open_decoder(arguments.bundle, target="onnx", threads=arguments.threads)
    loaded = time.perf_counter() - begin
    default = session.bundle.manifest.targets["onnx"].threads or "the engine's choice"
    print(f"bundle       {arguments.bundle}, loaded in {loaded:.2f} s, {len(session.experts)} experts")
    print(f"provider     {session.provider}")
    print(f"threads      {arguments.threads or default}")
    for name, value in describe_board().items():
        print(f"{name:<12} {value}")
    raw = arguments.raw or not session.codec.can_chat
    prompt = arguments.prompt if raw else session.codec.render_chat([{"role": "user", "content": arguments.prompt}])
    print(f"\n{arguments.prompt!r}, {arguments.tokens} tokens at most, one session:")
    for name in arguments.experts.split(",") if arguments.experts else session.experts:
        show(session, name, prompt, arguments.tokens)
    for file in arguments.install:
        begin = time.perf_counter()
        name = session.install(file)
        print(f"\ninstalled {name} from {file} in {(time.perf_counter() - begin) * 1e3:.1f} ms, nothing reloaded:")
        show(session, name, prompt, arguments.tokens)
    if len(session.experts) > 1:
        times = sorted(time_switches(session))
        print(f"\n{len(times)} more switches: median {times[len(times) // 2]:.1f} us, longest {times[-1]:.1f} us")
    print(f"temperature  {describe_board()['temperature']} now")


def bench(arguments: argparse.Namespace) -> None:
    """Print the JSON of lime_edge.bench.measure and nothing else."""
    names = arguments.experts.split(",") if arguments.experts else Bundle.open(arguments.bundle).manifest.experts
    print(f"timing {arguments.bundle} with expert {names[0]} ...", file=sys.stderr)
    options = BenchOptions(gen_tokens=arguments.tokens, prompt_tokens=arguments.prompt_tokens)
    facts = bench_bundle(arguments.bundle, "onnx", names[0], arguments.threads, options)
    print(json.dumps(facts | {"board": describe_board()}, indent=1))


def main() -> int:
    """Read the command line; a user's fault is one message and exit code 2 or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a directory that lime-edge export wrote")
    parser.add_argument("--prompt", default="That queen sees my kettle in the morning.")
    parser.add_argument("--raw", action="store_true", help="the prompt is complete: no chat template")
    parser.add_argument("--experts", help="NAME,NAME,...; all of them otherwise; --bench takes the first")
    parser.add_argument("--tokens", type=int, default=32, help="to generate at most")
    parser.add_argument("--threads", type=int, help="the bundle's default otherwise: 4 for --device raspberry-pi")
    parser.add_argument("--install", type=Path, action="append", default=[], metavar="FILE", help="a new expert")
    parser.add_argument("--bench", action="store_true", help="print the JSON of lime_edge.bench.measure instead")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of --bench")
    arguments = parser.parse_args()
    try:
        bench(arguments) if arguments.bench else run(arguments)
    except LimeEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
