"""Was the machine slowed down while it was measured? Clocks, heat, flags and rails, before and after.

Nothing is changed: the governor is read, not set. Where a machine tells nothing, that is said (null), not guessed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lime_edge.bench.energy import RailMeter
from lime_edge.bench.machine import SYS, read_governor, read_number, read_temperature, read_text

# Bits of get_throttled. Source: Raspberry Pi documentation, vcgencmd, get_throttled: 0 to 3 now, 16 to 19 since boot.
PI_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
SINCE_BOOT = 16
PATIENCE = 3.0  # seconds for a tool to answer


@dataclass(frozen=True)
class State:
    """A machine at one moment; None: it does not tell.

    governor; temperature_c: the hottest sensor; clock_mhz: the fastest core's clock; flags: what slows it down now;
    past: what has since boot; counts: events counted since boot, by name; rails_watts: power by rail.
    """

    governor: str | None
    temperature_c: float | None
    clock_mhz: float | None
    flags: tuple[str, ...] | None
    past: tuple[str, ...] | None
    counts: dict[str, int] | None
    rails_watts: dict[str, float] | None

    def describe(self) -> dict[str, Any]:
        """As the document has it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def read_state(root: Path = SYS) -> State:
    """Look at this machine now.

    Args:
        root: where the kernel shows its devices.
    """
    word = _read_pi_word(root)
    cooling = _read_cooling(root)
    flags = None if word is None and cooling is None else (*_name_bits(word or 0), *(cooling or ()))
    past = None if word is None else _name_bits(word >> SINCE_BOOT)
    files = root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [value for file in files if (value := read_number(file))]
    return State(
        read_governor(root),
        read_temperature(root),
        max(clocks) / 1e3 if clocks else None,
        flags,
        past,
        _count_events(root),
        _read_rails(root),
    )


def find_throttling(before: State, after: State) -> list[str] | None:
    """What slowed the machine down between two moments, in words; empty: nothing; None: it does not tell.

    A flag that is set at either moment counts; one "since boot" counts when it came in between; so do events.
    """
    if after.flags is None and after.counts is None:
        return None
    found = [*(before.flags or ()), *(after.flags or ())]
    found += [name for name in after.past or () if name not in (before.past or ())]
    for name, count in (after.counts or {}).items():
        if (more := count - (before.counts or {}).get(name, count)) > 0:
            found.append(f"{name}: {more} times")
    return list(dict.fromkeys(found))


def _name_bits(word: int) -> tuple[str, ...]:
    return tuple(name for bit, name in PI_FLAGS.items() if word >> bit & 1)


def _read_pi_word(root: Path) -> int | None:
    """A Raspberry Pi's flags: from its firmware's file, else from vcgencmd."""
    texts = [read_text(file) for file in sorted(root.glob("devices/platform/*/*firmware/get_throttled"))]
    if root == SYS and not any(texts):
        texts.append(_ask("vcgencmd", "get_throttled").removeprefix("throttled="))
    for text in texts:
        if text and re.fullmatch(r"(0x)?[0-9a-fA-F]+", text.strip()):
            return int(text.strip(), 16)
    return None


def _read_cooling(root: Path) -> tuple[str, ...] | None:
    """Processors that the kernel cools by slowing them down.

    Source: Linux, sysfs-class-thermal (type, cur_state, max_state).
    """
    found, any_there = [], False
    for device in sorted(root.glob("class/thermal/cooling_device*")):
        kind = (read_text(device / "type") or "").lower()
        if "cpu" in kind or "processor" in kind:
            any_there = True
            if state := read_number(device / "cur_state"):
                found.append(f"{kind} cooled, state {state:.0f} of {read_number(device / 'max_state') or 0:.0f}")
    return tuple(dict.fromkeys(found)) if any_there else None


def _count_events(root: Path) -> dict[str, int] | None:
    """Throttling events: Intel's by package and core, a Jetson's by over-current alarm.

    Source: Linux, x86 therm_throt.c (thermal_throttle/*_throttle_count); Jetson Linux Developer Guide (oc*_event_cnt).
    """
    found = {}
    for kind in ("core", "package"):
        files = root.glob(f"devices/system/cpu/cpu[0-9]*/thermal_throttle/{kind}_throttle_count")
        counts = [int(value) for file in files if (value := read_number(file)) is not None]
        if counts:
            found[f"thermal throttling of the {kind}"] = sum(counts)
    for file in sorted(root.glob("class/hwmon/hwmon*/oc*_event_cnt")):
        if (value := read_number(file)) is not None:
            found[f"over-current {file.name.removesuffix('_event_cnt')}"] = int(value)
    return found or None


def _read_rails(root: Path) -> dict[str, float] | None:
    """Watts by rail: INA3221 sensors, else one line of tegrastats ("VDD_IN 4996mW/4996mW")."""
    meter = RailMeter.find(root)
    if meter is not None:
        return meter.read_rails()
    if root != SYS or not shutil.which("tegrastats"):
        return None
    line = _ask("timeout", "1", "tegrastats", "--interval", "200").partition("\n")[0]
    return read_tegrastats(line) or None


def read_tegrastats(line: str) -> dict[str, float]:
    """Watts by rail: "VDD_IN 4996mW/5012mW" is now and on average.

    Source: Jetson Linux Developer Guide, tegrastats.
    """
    return {name: int(now) / 1e3 for name, now in re.findall(r"\b([A-Z][A-Z0-9_]+) (\d+)mW/\d+mW", line)}


def _ask(*command: str) -> str:
    """What a tool prints, or nothing."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
