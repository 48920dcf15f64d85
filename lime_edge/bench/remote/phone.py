"""The benchmark on a phone: bring the bundle to the app, start its benchmark without a screen, take its document back.

The app is the one of examples/android, or any with the library's BenchmarkActivity: `am start --es bundle NAME ...`
makes it write files/OUTPUT, a document of docs/bench-schema.md. It has to allow `run-as`: a debuggable build.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from lime_edge.bench.remote.adb import SHARED, Cut, Phone, find_phone
from lime_edge.bench.remote.addresses import Device
from lime_edge.bench.remote.plan import Outcome, Task
from lime_edge.bench.remote.probe import LEAST_MEMORY
from lime_edge.bench.remote.steps import Load
from lime_edge.bench.throttling import State, find_throttling
from lime_edge.checks.doctor import BAD, GOOD, Finding
from lime_edge.errors import EXIT_MISSING, EXIT_STORAGE, LimeEdgeError

ACTIVITY = "limeedge.android.BenchmarkActivity"
ABIS = ("arm64-v8a", "x86_64")
OLDEST = 26  # API level of Android 8.0
LIMIT = 3600.0  # seconds that a benchmark may take
PAUSE = 0.5
Tell = Callable[[str, int, int], None]
# $1: where the pushed files are, by sha256; $2: the bundle's name. A line of files: sha256, path. What was not pushed
# is a file of the bundle that lies there. The new folder takes the old one's place when it is whole.
ASSEMBLE = """
set -e
mkdir -p files/bundles && cd files/bundles
[ -d "$2" ] || [ ! -d ".$2.old" ] || mv ".$2.old" "$2"
rm -rf ".$2.partial" ".$2.old"
while read -r sha path; do
    new=".$2.partial/$path"; mkdir -p "$(dirname "$new")"
    from="$1/$sha"
    [ -f "$from" ] || from="$2/$(grep "^$sha " "$1/have" | head -n 1 | cut -d " " -f 2-)"
    cat "$from" > "$new"
    [ "$(sha256sum < "$new" | cut -d " " -f 1)" = "$sha" ] || { echo "$path arrived with another sha256"; exit 3; }
done < "$1/files"
[ ! -d "$2" ] || mv "$2" ".$2.old"
mv ".$2.partial" "$2"
rm -rf ".$2.old"
"""
LOOK = """
for cpu in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
    echo "governor $(cat $cpu/scaling_governor 2>/dev/null)"; echo "clock $(cat $cpu/scaling_cur_freq 2>/dev/null)"
done
for zone in /sys/class/thermal/thermal_zone*/temp; do echo "heat $(cat $zone 2>/dev/null)"; done
echo "status $(dumpsys thermalservice 2>/dev/null | grep -m 1 'Thermal Status' | tr -dc 0-9)"
battery=/sys/class/power_supply/battery
echo "current $(cat $battery/current_now 2>/dev/null)"; echo "voltage $(cat $battery/voltage_now 2>/dev/null)"
"""
# Source: Android, PowerManager.THERMAL_STATUS_*.
STATUS = ("", "light", "moderate", "severe", "critical", "emergency", "shutdown")


async def bench_phone(device: Device, task: Task, tell: Tell, track: Callable[[Any], None]) -> Outcome:
    """Do a benchmark task on a phone.

    Raises:
        LimeEdgeError: an app cannot do this; the phone or its app is not ready; the benchmark failed.
    """
    if task.extras is None:
        raise LimeEdgeError(
            f"{device.name}: the app on a phone has a benchmark of one bundle and one prompt length, nothing else",
            "no verify, run, `target`, `depth` or `baseline` over adb; lime-edge doctor --on adb looks at the phone",
        )
    phone = await asyncio.to_thread(find_phone, device)
    track(phone)
    try:
        return await asyncio.to_thread(_work, phone, task, tell)
    except asyncio.CancelledError:
        phone.stop.set()
        raise


def _work(phone: Phone, task: Task, tell: Tell) -> Outcome:
    """In a thread of its own, for adbutils blocks."""
    load, extras = task.loads[0], task.extras or {}
    check_phone(phone, load.bundle.total_bytes)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", load.bundle.path.resolve().name.removesuffix(".lime")).lstrip("._-")[:59]
    bring(phone, load, f"{name}.lime", tell)
    phone.step = "running the app's benchmark"
    before = read_phone_state(phone)
    text = run_benchmark(phone, extras | {"bundle": name}, tell)
    document = json.loads(text)
    after = read_phone_state(phone)
    document |= {"state": {"before": before.describe(), "after": after.describe()}}
    document |= {"throttled": find_throttling(before, after), "bundle": str(load.bundle.path)}
    if task.clean:
        phone.run_as('rm -rf "files/bundles/$1"', f"{name}.lime")
    return Outcome(
        phone.device,
        0,
        json.dumps(document).encode(),
        files=phone.sent,
        freed=load.bundle.total_bytes if task.clean else None,
    )


def list_lacks(phone: Phone, needed: int = 0) -> list[Finding]:
    """The phone's processor, system, app, memory and storage, as findings.

    Args:
        needed: bytes of a bundle, which for a moment lies there twice.
    """
    facts = phone.shell(
        "getprop ro.product.cpu.abi; getprop ro.build.version.sdk; getprop ro.product.model;"
        " df -Pk /data | tail -n 1 | awk '{ print $4 }'; awk '/^MemAvailable/ { print $2 }' /proc/meminfo"
    )
    abi, level, model, free, memory = [*facts.splitlines(), "", "", "", "", ""][:5]
    package = phone.device.package
    findings = [Finding("device", "phone", GOOD, model)]
    hint = "ONNX Runtime and the app are built for 64 bit"
    findings.append(
        Finding("device", "processor", GOOD, abi) if abi in ABIS else Finding("device", "processor", BAD, abi, hint)
    )
    new = level.isdecimal() and int(level) >= OLDEST
    findings.append(
        Finding("device", "Android", GOOD if new else BAD, f"API {level}", "" if new else f"API {OLDEST} or newer")
    )
    findings.append(_judge_room("storage", free, 2 * needed, "delete something on the phone"))
    findings.append(_judge_room("memory", memory, LEAST_MEMORY, "close other apps"))
    if not phone.shell(f"pm path {shlex.quote(package)}", check=False).startswith("package:"):
        hint = "build and install examples/android (gradle installDebug), or name the app: package in the hosts file"
        return [*findings, Finding("device", "app", BAD, f"{package} is not installed", hint)]
    told = phone.shell(f"run-as {shlex.quote(package)} id", check=False)
    if not told.startswith("uid="):
        hint = "its files are reached by run-as, which wants a debuggable build: gradle installDebug"
        return [*findings, Finding("device", "app", BAD, f"{package} does not allow run-as: {told[:200]}", hint)]
    return [*findings, Finding("device", "app", GOOD, package)]


def _judge_room(what: str, kilobytes: str, needed: int, hint: str) -> Finding:
    if not kilobytes.isdecimal():
        return Finding("device", what, GOOD, "unknown")
    free = int(kilobytes) * 1024
    if free < needed:
        return Finding("device", what, BAD, f"expected {needed / 1e6:.0f} MB free, found {free / 1e6:.0f}", hint)
    return Finding("device", what, GOOD, f"{free / 1e9:.1f} GB free")


def check_phone(phone: Phone, needed: int) -> None:
    """Refuse before anything is brought.

    Raises:
        LimeEdgeError: what the phone lacks, all of it.
    """
    bad = [finding for finding in list_lacks(phone, needed) if finding.state == BAD]
    if bad:
        problem = "; ".join(f"{finding.what}: {finding.found}" for finding in bad)
        raise LimeEdgeError(f"{phone.device.name}: {problem}", "; ".join(f.hint for f in bad if f.hint), EXIT_MISSING)


async def examine_phone(device: Device) -> list[Finding]:
    """What `doctor --on adb` finds.

    Raises:
        LimeEdgeError: no such phone.
    """
    phone = await asyncio.to_thread(find_phone, device)
    return await asyncio.to_thread(list_lacks, phone)


def bring(phone: Phone, load: Load, name: str, tell: Tell) -> None:
    """Bring what the app's copy of the bundle lacks; nothing where it is the same.

    Raises:
        LimeEdgeError: no room, a lost phone.
    """
    phone.step = f"bringing {load.bundle.path}"
    have = find_contents(phone, name)
    wanted = load.files | {"lime.json": load.describe_manifest()}
    if {path: have.get(path) for path in wanted} == wanted:
        return
    sizes = {path: (load.bundle.path / path).stat().st_size for path in wanted}
    missing = {digest: path for path, digest in wanted.items() if digest not in have.values()}
    stage = f"{SHARED}/lime-edge.{secrets.token_hex(6)}"
    total, done = sum(sizes[path] for path in missing.values()), 0
    phone.shell(f"rm -rf {SHARED}/lime-edge.*; mkdir -p {stage} && chmod 755 {stage}")
    try:
        for digest, path in missing.items():
            tell("bundle, kB", done // 1000, max(1, total // 1000))
            phone.push(load.bundle.path / path, f"{stage}/{digest}")
            done += sizes[path]
        tell("bundle, kB", total // 1000, max(1, total // 1000))
        lists = {
            "files": "".join(f"{digest} {path}\n" for path, digest in wanted.items()),
            "have": "".join(f"{digest} {path}\n" for path, digest in have.items()),
        }
        with tempfile.TemporaryDirectory(prefix="lime-edge.") as folder:
            for file, text in lists.items():
                (Path(folder) / file).write_text(text, encoding="utf-8")
                phone.push(Path(folder) / file, f"{stage}/{file}")
        phone.run_as(ASSEMBLE, stage, name)
    except (LimeEdgeError, Cut):
        phone.stop.clear()
        phone.run_as('rm -rf "files/bundles/.$1.partial"', name, check=False)
        raise
    finally:
        phone.shell(f"rm -rf {stage}", check=False)


def find_contents(phone: Phone, name: str) -> dict[str, str]:
    """path -> sha256 of the app's copy, as its own manifest says, for files that have the manifest's size."""
    data = phone.read(f"files/bundles/{name}/lime.json")
    try:
        files = json.loads(data)["files"]
    except (ValueError, KeyError, TypeError):
        return {}
    listed = phone.run_as('cd "files/bundles/$1" && find . -type f -exec stat -c "%s %n" {} +', name, check=False)
    sizes = {path.removeprefix("./"): size for size, _, path in (line.partition(" ") for line in listed.splitlines())}
    found = {path: entry["sha256"] for path, entry in files.items() if sizes.get(path) == str(entry["size"])}
    return found | {"lime.json": sha256(data).hexdigest()}


def run_benchmark(phone: Phone, extras: dict[str, str], tell: Tell) -> str:
    """Start the activity and wait for its document.

    Raises:
        LimeEdgeError: the app said that it failed, ended without a document, or took too long.
    """
    output, package = f"bench-{secrets.token_hex(6)}.json", shlex.quote(phone.device.package)
    began = phone.shell("date '+%m-%d %H:%M:%S.000'")
    words = [word for key, value in (extras | {"output": output}).items() for word in ("--es", key, value)]
    told = phone.shell(f"am start -W -n {package}/{ACTIVITY} {' '.join(map(shlex.quote, words))}", check=False)
    if "Error" in told or "Exception" in told:
        hint = "is this the app of examples/android, with the library's BenchmarkActivity?"
        raise LimeEdgeError(f"{phone.device.name}: the benchmark cannot be started: {told[-300:]}", hint, EXIT_MISSING)
    try:
        return _wait(phone, output, began, tell)
    except (LimeEdgeError, Cut):
        phone.stop.clear()
        phone.shell(f"am force-stop {package}", check=False)
        raise
    finally:
        phone.run_as('rm -f "files/$1" "files/.$1.partial"', output, check=False)


def _wait(phone: Phone, output: str, began: str, tell: Tell) -> str:
    name, deadline, gone = phone.device.name, time.monotonic() + LIMIT, 0
    while time.monotonic() < deadline:
        if data := phone.read(f"files/{output}"):  # it appears by a rename: whole
            return data.decode()
        log = phone.shell(f"logcat -d -v raw -T {shlex.quote(began)} -s LimeBench", check=False)
        lines = [line for line in log.splitlines() if line and not line.startswith("---")]
        if failed := [line for line in lines if line.startswith("failed")]:
            raise LimeEdgeError(f"{name}: the app's benchmark {failed[-1]}", "adb logcat -s LimeBench says more")
        if rounds := re.findall(r"round (\d+) of (\d+)", log):
            tell("rounds", int(rounds[-1][0]), int(rounds[-1][1]))
        gone = gone + 1 if not phone.shell(f"pidof {shlex.quote(phone.device.package)}", check=False) else 0
        if gone > 3:
            hint = "killed, perhaps for its memory: adb logcat says why; a smaller model, or close other apps"
            raise LimeEdgeError(f"{name}: the app ended without a document", hint, EXIT_STORAGE)
        if phone.stop.wait(PAUSE):
            raise Cut
    raise LimeEdgeError(f"{name}: no document after {LIMIT / 60:.0f} minutes", "adb logcat -s LimeBench says more", 1)


def read_phone_state(phone: Phone) -> State:
    """The phone now, as far as adb's user may look."""
    found: dict[str, list[str]] = {}
    for line in phone.shell(LOOK.strip(), check=False).splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value.strip())

    def numbers(key: str) -> list[float]:
        return [float(text) for text in found.get(key, ()) if re.fullmatch(r"-?\d+", text)]

    governors, status, heat = {text for text in found.get("governor", ()) if text}, numbers("status"), numbers("heat")
    current, voltage = numbers("current"), numbers("voltage")
    level = STATUS[min(int(status[0]), len(STATUS) - 1)] if status else ""
    return State(
        "+".join(sorted(governors)) or None,
        max(heat) / 1e3 if heat else None,
        max(numbers("clock")) / 1e3 if numbers("clock") else None,
        (f"thermal status {level}",) if level else () if status else None,
        None,
        None,
        {"battery": abs(current[0] * voltage[0]) / 1e12} if current and voltage else None,
    )
