"""Directories like the kernel's /sys, for what reads sensors."""

from __future__ import annotations

from pathlib import Path


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write files under `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def plant_rapl(root: Path) -> Path:
    """Two packages, one with its DRAM; a zone inside a package, and psys, which count the same joules again."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }
    files: dict[str, str] = {}
    for zone, name in zones.items():
        folder = f"class/powercap/{zone}"
        files |= {f"{folder}/name": name, f"{folder}/energy_uj": "1000000"}
        files[f"{folder}/max_energy_range_uj"] = "262143328850"
    return plant(root, files)


def plant_jetson(root: Path, board_rail: bool = True) -> Path:
    """An Orin's INA3221: 5000 mV x 2000 mA = 10 W in all, of which 1 W and 0.5 W; and a sensor of another kind."""
    rails = {
        1: ("VDD_IN" if board_rail else "VIN_SYS_5V0", 5000, 2000),
        2: ("VDD_CPU_GPU_CV", 5000, 200),
        3: ("VDD_SOC", 5000, 100),
    }
    files = {
        "class/hwmon/hwmon0/name": "nvme",
        "class/hwmon/hwmon0/in1_input": "9999",
        "class/hwmon/hwmon0/curr1_input": "9999",
        "class/hwmon/hwmon3/name": "ina3221",
    }
    for channel, (label, volts, amperes) in rails.items():
        folder = "class/hwmon/hwmon3"
        files |= {
            f"{folder}/in{channel}_label": label,
            f"{folder}/in{channel}_input": str(volts),
            f"{folder}/curr{channel}_input": str(amperes),
        }
    return plant(root, files)


def plant_thermal(root: Path) -> Path:
    """Two thermal zones in thousandths of a degree, the hotter at 51.5."""
    return plant(root, {"class/thermal/thermal_zone0/temp": "43000", "class/thermal/thermal_zone1/temp": "51500"})


def plant_clocks(root: Path, governors: tuple[str, ...]) -> Path:
    """A core per governor, the last the fastest: 1000 MHz and 500 more each."""
    files: dict[str, str] = {}
    for core, governor in enumerate(governors):
        folder = f"devices/system/cpu/cpu{core}/cpufreq"
        files |= {f"{folder}/scaling_governor": governor, f"{folder}/cpuinfo_max_freq": str(1_000_000 + 500_000 * core)}
    return plant(root, files)
