"""One model, several skills, on a Jetson: execution providers, power rails, the same prompt for every expert, speeds.

    pip install 'lime-edge[onnx]'
    python demo.py smollm2.lime
    python demo.py smollm2.lime --providers CPUExecutionProvider --install new-skill.safetensors
    python demo.py smollm2.lime --bench > bench.json

It runs on any Linux computer; what a computer cannot tell is said to be unknown. README.md says what was tested.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from lime_edge.bench.measure import BenchOptions, bench_bundle, time_switches
from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.open import open_decoder


@dataclass(frozen=True)
class Answer:
    """What one expert wrote, how fast, and the power drawn right after its last token, per rail in watts."""

    text: str
    first_ms: float
    tokens_per_s: float
    watts: dict[str, float]


def read_text(file: Path) -> str | None:
    """The text of a file of /sys or /proc, or None."""
    try:
        return file.read_text().strip("\0\n ") or None
    except OSError:
        return None


def read_number(file: Path) -> float | None:
    """The number in a file, or None."""
    try:
        return float(read_text(file) or "")
    except ValueError:
        return None


def read_power(root: Path = Path("/")) -> dict[str, float]:
    """Watts per rail from the board's INA3221 sensors; empty where there are none.

    Source: Linux, Documentation/hwmon/ina3221.rst (in[123]_input mV, curr[123]_input mA, in[123]_label).
    """
    watts = {}
    for sensor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if read_text(sensor / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            volts = read_number(sensor / f"in{channel}_input")
            amperes = read_number(sensor / f"curr{channel}_input")
            if volts is not None and amperes is not None:
                label = read_text(sensor / f"in{channel}_label") or f"{sensor.name} channel {channel}"
                watts[label] = volts * amperes / 1e6
    return watts


def read_temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius per thermal zone that has a reading."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    found = {(read_text(zone / "type") or zone.name): read_number(zone / "temp") for zone in zones}
    return {name: value / 1000 for name, value in found.items() if value is not None}


def describe_board(root: Path = Path("/")) -> dict[str, str]:
    """What the board says about itself; "unknown (FILE)" where it says nothing."""
    files = {
        "board": root / "proc/device-tree/model",
        "release": root / "etc/nv_tegra_release",
        "governor": root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    }
    facts = {name: read_text(file) or f"unknown ({file})" for name, file in files.items()}
    devices = sorted((root / "sys/class/devfreq").glob("*gpu*")) + sorted((root / "sys/class/devfreq").glob("*gv11b*"))
    clocks = [f"{hertz / 1e6:.0f} MHz" for gpu in devices if (hertz := read_number(gpu / "cur_freq")) is not None]
    heat = ", ".join(f"{name} {value:.1f} C" for name, value in read_temperatures(root).items())
    return facts | {
        "gpu clock": ", ".join(clocks) or f"unknown ({root / 'sys/class/devfreq'} names no gpu)",
        "temperature": heat or f"unknown ({root / 'sys/class/thermal'})",
        "power": show_power(read_power(root)) or f"unknown (no ina3221 in {root / 'sys/class/hwmon'})",
    }


def show_power(watts: dict[str, float]) -> str:
    """Rails as text."""
    return ", ".join(f"{name} {value:.2f} W" for name, value in watts.items())


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
    watts = read_power()
    if not tokens:
        return Answer("", 0.0, 0.0, watts)
    seconds = stamps[-1] - stamps[1]
    speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else 0.0
    return Answer(session.codec.decode(tokens).strip(), (stamps[1] - stamps[0]) * 1e3, speed, watts)


def show(session: Session, name: str, prompt: str, count: int) -> None:
    """Switch to an expert, answer, and print one line."""
    took = switch(session, name)
    got = answer(session, prompt, count)
    power = f"   {show_power(got.watts)}" if got.watts else ""
    print(
        f"{name:<16} switch {took:6.1f} us   first token {got.first_ms:7.1f} ms   "
        f"{got.tokens_per_s:6.1f} tokens/s{power}   {got.text!r}",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """The demonstration."""
    bundle = Bundle.open(arguments.bundle)
    wanted = tuple(arguments.providers.split(",")) if arguments.providers else ()
    begin = time.perf_counter()
    session = open_decoder(bundle, "onnx", SessionOptions(threads=arguments.threads, providers=wanted))
    loaded = time.perf_counter() - begin
    facts = bundle.manifest.targets["onnx"]
    print(f"bundle       {arguments.bundle}, loaded in {loaded:.2f} s, {len(session.experts)} experts")
    print(f"asked for    {', '.join(wanted or facts.providers)}")
    print(f"available    {', '.join(onnxruntime.get_available_providers())}")
    print(f"provider     {session.provider}")
    if session.provider == "CPUExecutionProvider":
        print("             the CPU: this onnxruntime has no CUDA, or the bundle does not ask for it (see README.md)")
    print(f"threads      {arguments.threads or facts.threads or 'the engine chooses'}")
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


def bench(arguments: argparse.Namespace) -> None:
    """Print the JSON of lime_edge.bench.measure and nothing else; providers are the bundle's."""
    names = arguments.experts.split(",") if arguments.experts else Bundle.open(arguments.bundle).manifest.experts
    print(f"timing {arguments.bundle} with expert {names[0]} ...", file=sys.stderr)
    options = BenchOptions(gen_tokens=arguments.tokens, prompt_tokens=arguments.prompt_tokens)
    facts = bench_bundle(arguments.bundle, "onnx", names[0], arguments.threads, options)
    print(json.dumps(facts | {"board": describe_board(), "watts_after": read_power()}, indent=1))


def main() -> int:
    """Read the command line; a user's fault is one message and exit code 2 or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a directory that lime-edge export wrote")
    parser.add_argument("--prompt", default="That queen sees my kettle in the morning.")
    parser.add_argument("--raw", action="store_true", help="the prompt is complete: no chat template")
    parser.add_argument("--experts", help="NAME,NAME,...; all of them otherwise; --bench takes the first")
    parser.add_argument("--tokens", type=int, default=32, help="to generate at most")
    parser.add_argument("--threads", type=int, help="the bundle's default otherwise")
    parser.add_argument("--providers", help="NAME,NAME,... to try in this order, instead of the bundle's")
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
