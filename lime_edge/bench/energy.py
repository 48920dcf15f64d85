"""Energy, where the device tells: Linux powercap counters (RAPL) or a Jetson's INA3221 power sensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lime_edge.bench.inputs import draw_inputs, draw_prompt
from lime_edge.bench.machine import SYS, read_number, read_text
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession

LONG = 1.0  # seconds of work: counters tick, sensors are slow
PERIOD = 0.02  # seconds between two readings of a power sensor
BOARD = ("VDD_IN", "POM_5V_IN")  # rails that carry everything else


class Meter(Protocol):
    """Something that counts joules. source: which; counted: the zones or rails that are added up."""

    source: str
    counted: tuple[str, ...]

    def measure(self, work: Callable[[], object]) -> tuple[float, float]:
        """Run `work`; joules drawn meanwhile, and seconds."""


def find_meter(root: Path = SYS) -> Meter | None:
    """The first meter that can be read, or None."""
    return CounterMeter.find(root) or RailMeter.find(root)


class CounterMeter:
    """powercap: counters of microjoules that wrap. The packages and their DRAM are added; psys would hold both.

    Source: Linux, Documentation/power/powercap/powercap.rst (energy_uj, max_energy_range_uj in microjoules).
    """

    source = "rapl"

    def __init__(self, zones: dict[str, Path]):
        self._zones = zones
        self.counted = tuple(zones)

    @classmethod
    def find(cls, root: Path) -> CounterMeter | None:
        """The readable counters under `root`, or None (energy_uj is often readable by root only)."""
        zones = {}
        for zone in sorted((root / "class/powercap").glob("intel-rapl:*")):
            name = read_text(zone / "name") or ""
            if name.startswith(("package", "dram")) and read_number(zone / "energy_uj") is not None:
                zones[f"{zone.name} {name}"] = zone
        return cls(zones) if zones else None

    def measure(self, work: Callable[[], object]) -> tuple[float, float]:
        """Run `work`; joules of all zones, and seconds."""
        before, begin = self._read(), time.perf_counter()
        work()
        seconds, after = time.perf_counter() - begin, self._read()
        total = 0.0
        for name, zone in self._zones.items():
            used = after[name] - before[name]
            if used < 0:
                used += read_number(zone / "max_energy_range_uj") or 0.0
            total += used
        return total / 1e6, seconds

    def _read(self) -> dict[str, float]:
        return {name: read_number(zone / "energy_uj") or 0.0 for name, zone in self._zones.items()}


class RailMeter:
    """INA3221: volts and amperes of three rails a chip, sampled and integrated (trapezoids).

    The board's own rail alone where there is one (VDD_IN carries all others), else all rails together.

    Source: Linux, Documentation/hwmon/ina3221.rst (in[123]_input mV, curr[123]_input mA, in[123]_label).
    """

    source = "ina3221"

    def __init__(self, rails: dict[str, tuple[Path, Path]]):
        board = [name for name in rails if name in BOARD]
        self._all = rails
        self._rails = {name: rails[name] for name in board[:1]} or rails
        self.counted = tuple(self._rails)

    @classmethod
    def find(cls, root: Path) -> RailMeter | None:
        """The connected rails under `root`, or None."""
        rails = {}
        for sensor in sorted((root / "class/hwmon").glob("hwmon*")):
            if read_text(sensor / "name") != "ina3221":
                continue
            for channel in (1, 2, 3):
                volts, amperes = sensor / f"in{channel}_input", sensor / f"curr{channel}_input"
                label = read_text(sensor / f"in{channel}_label") or f"{sensor.name}.{channel}"
                if label != "NC" and read_number(volts) is not None and read_number(amperes) is not None:
                    rails[label] = (volts, amperes)
        return cls(rails) if rails else None

    def read_watts(self) -> float:
        """The power of the counted rails now."""
        return sum(_read_watts(self._rails).values())

    def read_rails(self) -> dict[str, float]:
        """Watts of every connected rail now, whether it is counted or not."""
        return _read_watts(self._all)

    def measure(self, work: Callable[[], object]) -> tuple[float, float]:
        """Run `work` beside a thread that reads the sensors; joules, and seconds."""
        stop, samples = threading.Event(), [(time.perf_counter(), self.read_watts())]

        def sample() -> None:
            while not stop.wait(PERIOD):
                samples.append((time.perf_counter(), self.read_watts()))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            work()
        finally:
            stop.set()
            thread.join()
        samples.append((time.perf_counter(), self.read_watts()))
        joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(samples, samples[1:], strict=False))
        return joules, samples[-1][0] - samples[0][0]


def _read_watts(rails: dict[str, tuple[Path, Path]]) -> dict[str, float]:
    """Watts by rail, from millivolts and milliamperes."""
    found = {name: (read_number(volts), read_number(amperes)) for name, (volts, amperes) in rails.items()}
    return {name: (volts or 0.0) * (amperes or 0.0) / 1e6 for name, (volts, amperes) in found.items()}


def spend_tokens(meter: Meter, session: Session, length: int, depth: int | None, count: int) -> dict[str, Any]:
    """Joules per token of a prompt and of an answer; in work of its own, untimed.

    Decoding is what a prompt with an answer takes beyond the prompt alone.

    Args:
        length: tokens of the prompt. depth: in the cache before decoding, None: the prompt's. count: decoded.
    """
    facts = _describe_meter(meter)
    vocab = session.bundle.manifest.backbone.vocab
    prompt = draw_prompt(vocab, length)
    before = prompt if depth is None else draw_prompt(vocab, depth)

    def answer() -> None:
        session.logits(before, keep=1)
        for _ in range(count):
            session.extend([prompt[0]])

    prefill = _average(meter, lambda: session.logits(prompt, keep=1))
    filling = prefill if depth is None else _average(meter, lambda: session.logits(before, keep=1))
    decode = (_average(meter, answer) - filling) / count
    return facts | {"prefill_joules_per_token": prefill / length, "decode_joules_per_token": decode}


def spend_calls(meter: Meter, session: EncoderSession, length: int) -> dict[str, Any]:
    """Joules per call of an encoder; in work of its own, untimed.

    Args:
        length: tokens of a text.
    """
    inputs = draw_inputs(session, length)
    return _describe_meter(meter) | {"joules_per_run": _average(meter, lambda: session.run(**inputs))}


def _describe_meter(meter: Meter) -> dict[str, Any]:
    """What is measured with, what idling draws, and places for what work draws."""
    idle, seconds = meter.measure(lambda: time.sleep(LONG))
    return {
        "source": meter.source,
        "counted": list(meter.counted),
        "idle_watts": idle / seconds,
        "prefill_joules_per_token": None,
        "decode_joules_per_token": None,
        "joules_per_run": None,
    }


def _average(meter: Meter, work: Callable[[], object]) -> float:
    """Joules of one `work`, from as many in a row as fill the time that a meter needs."""
    done = 0

    def repeat() -> None:
        nonlocal done
        end = time.perf_counter() + LONG
        while not done or time.perf_counter() < end:
            work()
            done += 1

    return meter.measure(repeat)[0] / done
