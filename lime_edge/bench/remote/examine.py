"""What devices lack, and what works there: `doctor --on`. Nothing is installed; the helper alone is brought."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import lime_edge
from lime_edge.bench.remote.addresses import ADB, Device
from lime_edge.bench.remote.fleet import visit
from lime_edge.bench.remote.phone import examine_phone
from lime_edge.bench.remote.probe import ENVIRONMENT_SIZE, Facts, find_lacks, probe
from lime_edge.bench.remote.ssh import connect
from lime_edge.bench.remote.steps import Load, Site
from lime_edge.checks.doctor import BAD, GOOD, NOTE, Finding, meets
from lime_edge.errors import EXIT_MISSING, LimeEdgeError

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DeviceDiagnosis:
    """Findings of a device, and those of lime-edge's own doctor there, where there is an environment of this version.

    doctor_code: that doctor's exit code; works: what it says one can do.
    """

    findings: tuple[Finding, ...]
    engines: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    doctor_code: int = 0

    @property
    def exit_code(self) -> int:
        """4 where the device lacks something; else what the doctor there ended with."""
        lacking = any(finding.state == BAD for finding in self.findings if finding.topic == "device")
        return EXIT_MISSING if lacking else self.doctor_code

    def describe(self) -> dict[str, Any]:
        """As `lime-edge doctor --json` describes this machine."""
        return {
            "lime_edge": lime_edge.__version__,
            "engines": list(self.engines),
            "works": list(self.works),
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine_devices(devices: list[Device], load: Load | None, tell: Tell) -> list[DeviceDiagnosis]:
    """Look at every device, side by side; one that cannot be reached is a finding."""

    async def work(device: Device, tell: Tell, track: Callable[[Any], None]) -> DeviceDiagnosis:
        try:
            if device.kind == ADB:
                return DeviceDiagnosis(tuple(await examine_phone(device)))
            return await examine_device(device, load, tell, track)
        except LimeEdgeError as error:
            return DeviceDiagnosis((Finding("device", device.name, BAD, error.problem, error.hint),))

    found: list[DeviceDiagnosis] = visit(devices, work, tell)
    return found


async def examine_device(
    device: Device, load: Load | None, tell: Tell, track: Callable[[Any], None]
) -> DeviceDiagnosis:
    """Look at one device over ssh.

    Raises:
        LimeEdgeError: it cannot be reached.
    """
    async with connect(device) as connection:
        track(connection)
        facts = await probe(connection)
        findings = _examine_facts(device, facts)
        lacks = {what for what, *_ in find_lacks(device, facts)}
        if facts.python is None or "folder" in lacks:
            return DeviceDiagnosis(tuple(findings))
        site = Site(connection, facts, facts.python, tell)
        await site.bring_helper()
        site.there = await site.ask("look", {"key": "", "bundles": _ask_for(load), "packages": list(_needed())})
        findings += _examine_python(device, site.there)
        key = next((key for key, version in site.there["environments"] if version == lime_edge.__version__), None)
        if load is not None and not site.there["bundles"][0]:
            hint = "lime-edge bench or verify --on brings it"
            findings.append(Finding("device", "bundle", NOTE, f"{load.bundle.path} is not there", hint))
        if key is None:
            found = "not made yet" if not site.there["environments"] else "none of this version"
            findings.append(
                Finding("device", "environment", NOTE, found, "lime-edge bench, verify or run --on makes it")
            )
            return DeviceDiagnosis(tuple(findings))
        findings.append(
            Finding("device", "environment", GOOD, f"{facts.root}/env/{key}, lime-edge {lime_edge.__version__}")
        )
        places = [load.place(facts.root)] if load is not None and site.there["bundles"][0] else []
        answer = await site.execute(key, ["doctor", *places, "--json"], None)
    try:
        own = json.loads(answer.out)
    except ValueError:
        said = answer.err.strip()[-400:]
        findings.append(
            Finding(
                "device",
                "lime-edge",
                BAD,
                f"ended with {answer.code}: {said}",
                "lime-edge bench --on ... --clean, then again",
            )
        )
        return DeviceDiagnosis(tuple(findings))
    findings += [Finding(**finding) for finding in own["findings"]]
    return DeviceDiagnosis(tuple(findings), tuple(own["engines"]), tuple(own["works"]), own["exit_code"])


def _ask_for(load: Load | None) -> list[dict[str, Any]]:
    return [load.describe() | {"as_is": True}] if load is not None else []


def _examine_facts(device: Device, facts: Facts) -> list[Finding]:
    lacks = {what: (found, hint) for what, found, hint in find_lacks(device, facts)}
    seen = {
        "system": facts.system,
        "processor": facts.arch,
        "Python": next((f"{version}, {path}" for version, path in facts.pythons if path == facts.python), ""),
        "folder": facts.root,
        "memory": "unknown" if facts.memory is None else f"{facts.memory / 1e9:.2f} GB free",
    }
    findings = []
    for what, found in seen.items():
        if what in lacks:
            findings.append(Finding("device", what, BAD, *lacks[what]))
        else:
            findings.append(Finding("device", what, GOOD, found))
    text = "unknown" if facts.disk is None else f"{facts.disk / 1e9:.1f} GB free"
    if facts.disk is not None and facts.disk < ENVIRONMENT_SIZE:
        hint = f"an environment needs {ENVIRONMENT_SIZE / 1e9:.1f} GB: free some, or give the hosts file another folder"
        findings.append(Finding("device", "disk", NOTE, text, hint))
    else:
        findings.append(Finding("device", "disk", GOOD, text))
    if not facts.compiler:
        hint = "only where lime-edge has to be built there, for its operators: apt install gcc libc6-dev"
        findings.append(Finding("device", "C compiler", NOTE, "none", hint))
    return findings


def _examine_python(device: Device, there: dict[str, Any]) -> list[Finding]:
    """Whether the interpreter can make an environment, or has the packages that one would borrow."""
    if not device.site_packages:
        if there["venv"]:
            return []
        return [Finding("device", "venv", BAD, "the device's Python has no venv", "apt install python3-venv")]
    faults = []
    for name, wanted in _needed().items():
        version = there["packages"].get(name)
        if version is None:
            faults.append(f"{name} is missing")
        elif not meets(version, wanted):
            faults.append(f"{name} {version}, expected {wanted}")
    if faults:
        hint = "install them there, or leave `site_packages` out"
        return [Finding("device", "packages", BAD, "; ".join(faults), hint)]
    return [Finding("device", "packages", GOOD, f"all {len(_needed())} that lime-edge[onnx] needs")]


def _needed() -> dict[str, str]:
    """What lime-edge[onnx] requires: package -> versions."""
    found = {}
    for line in importlib.metadata.requires("lime-edge") or []:
        requirement, _, marker = line.partition(";")
        name, versions = re.match(r"\s*([\w.-]+)\s*(.*)", requirement).groups()  # type: ignore[union-attr]
        if "extra" not in marker or re.search(r"extra == ['\"]onnx['\"]", marker):
            found[name] = versions.strip()
    return found
