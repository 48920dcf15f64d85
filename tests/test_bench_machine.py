"""Sensors, clocks and the page cache, on trees like the kernel's own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from bench_trees import plant, plant_clocks, plant_jetson, plant_rapl, plant_thermal

from lime_edge.bench.energy import CounterMeter, RailMeter, find_meter
from lime_edge.bench.load import RESIDENT, drop_cache, find_resident, time_loads
from lime_edge.bench.machine import describe_machine, measure_copy, read_clock, read_governor, read_temperature


def advance(root: Path, **microjoules: int) -> None:
    for zone, amount in microjoules.items():
        file = root / "class/powercap" / f"intel-rapl:{zone.removeprefix('z').replace('_', ':')}" / "energy_uj"
        file.write_text(str((int(file.read_text()) + amount) % 262143328850))


def test_counters_add_packages_and_dram_only(tmp_path: Path) -> None:
    meter = find_meter(plant_rapl(tmp_path))
    assert isinstance(meter, CounterMeter)
    assert meter.counted == ("intel-rapl:0 package-0", "intel-rapl:0:1 dram", "intel-rapl:1 package-1")
    work = lambda: advance(tmp_path, z0=3_000_000, z0_0=50_000_000, z0_1=500_000, z1=1_000_000, z2=90_000_000)  # noqa: E731
    assert meter.measure(work)[0] == pytest.approx(4.5)


def test_a_counter_may_wrap(tmp_path: Path) -> None:
    meter = find_meter(plant_rapl(tmp_path))
    assert meter is not None
    advance(tmp_path, z0=262143328850 - 3_000_000)  # 2 J before its end
    assert meter.measure(lambda: advance(tmp_path, z0=5_000_000))[0] == pytest.approx(5.0)


def test_counters_that_may_not_be_read_are_none(tmp_path: Path) -> None:
    plant_rapl(tmp_path)
    for file in tmp_path.glob("class/powercap/*/energy_uj"):
        file.unlink()  # root reads whatever the mode says
    assert find_meter(tmp_path) is None


@pytest.mark.parametrize(
    ("board_rail", "watts", "counted"),
    [
        (True, 10.0, ("VDD_IN",)),
        (False, 11.5, ("VIN_SYS_5V0", "VDD_CPU_GPU_CV", "VDD_SOC")),
    ],
)
def test_rails_are_volts_times_amperes(tmp_path: Path, board_rail: bool, watts: float, counted: object) -> None:
    meter = find_meter(plant_jetson(tmp_path, board_rail))
    assert isinstance(meter, RailMeter) and meter.counted == counted
    assert meter.read_watts() == pytest.approx(watts)
    joules, seconds = meter.measure(lambda: time.sleep(0.05))
    assert seconds >= 0.05 and joules == pytest.approx(watts * seconds)


def test_rails_follow_what_is_drawn(tmp_path: Path) -> None:
    """The power doubles in the middle: more joules than the old power gives, fewer than the new one."""
    meter = find_meter(plant_jetson(tmp_path))
    assert meter is not None

    def work() -> None:
        time.sleep(0.1)
        plant(tmp_path, {"class/hwmon/hwmon3/curr1_input": "4000"})
        time.sleep(0.1)

    joules, seconds = meter.measure(work)
    assert 10.5 * seconds < joules < 19.5 * seconds


def test_unconnected_rails_are_left_out(tmp_path: Path) -> None:
    plant_jetson(tmp_path, board_rail=False)
    plant(tmp_path, {"class/hwmon/hwmon3/in3_label": "NC"})
    meter = find_meter(tmp_path)
    assert meter is not None and meter.counted == ("VIN_SYS_5V0", "VDD_CPU_GPU_CV")


def test_a_machine_without_sensors(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None
    assert read_temperature(tmp_path) is None and read_governor(tmp_path) is None and read_clock(tmp_path) is None
    facts = describe_machine(tmp_path)
    assert facts["governor"] is None and facts["max_mhz"] is None and facts["cores"] >= 1
    assert any(line.startswith(f"numpy {np.__version__}") for line in facts["packages"])


def test_heat_and_clocks(tmp_path: Path) -> None:
    plant_thermal(plant_clocks(tmp_path, ("schedutil", "schedutil", "performance")))
    assert read_temperature(tmp_path) == 51.5
    assert read_governor(tmp_path) == "performance+schedutil" and read_clock(tmp_path) == 2000.0
    sensors = {"class/hwmon/hwmon1/temp1_input": "38250", "class/hwmon/hwmon2/temp3_input": "61000"}
    assert read_temperature(plant(tmp_path / "pc", sensors)) == 61.0
    assert read_governor(plant_clocks(tmp_path / "pi", ("ondemand",))) == "ondemand"


def test_copy_speed_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is copied, by whatever number of threads; a byte counts as read and as written."""
    import lime_edge.bench.machine as machine

    copied: list[int] = []
    real, clock = np.copyto, iter(range(1000))

    def copy(to: np.ndarray, source: np.ndarray) -> None:
        copied.append(source.nbytes)
        real(to, source)

    monkeypatch.setattr(machine.np, "copyto", copy)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(clock)))  # every copy takes a second
    for threads in (1, 3):
        copied.clear()
        assert measure_copy(threads, 1 << 20) == 2 << 20
        assert sum(copied) == machine.COPIES << 20 and len(copied) == machine.COPIES * threads


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this platform cannot drop files from its cache")
def test_dropping_says_whether_it_worked(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 << 20))
    assert find_resident(file) == 1.0
    gone = drop_cache([file])
    resident = find_resident(file)
    assert resident is not None and gone == (resident < RESIDENT)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system here lives in memory only")
def test_files_that_live_in_memory_cannot_be_dropped() -> None:
    file = Path("/dev/shm") / f"lime-edge-test-{os.getpid()}"
    try:
        file.write_bytes(bytes(1 << 20))
        assert drop_cache([file]) is False
        loads = time_loads(object, [file], 2)
        assert len(loads.warm) == 2 and loads.cold == [] and loads.dropped is False
    finally:
        file.unlink(missing_ok=True)


def test_loads_are_let_go(tmp_path: Path) -> None:
    """Two loads at once would be two copies of the weights, and a mapped file cannot be dropped."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 16))
    alive: list[int] = []

    class Loaded:
        def __init__(self) -> None:
            alive.append(1)
            assert sum(alive) == 1

        def __del__(self) -> None:
            alive.append(-1)

    loads = time_loads(Loaded, [file], 3)
    assert len(loads.warm) == 3 and len(loads.cold) in (0, 3) and sum(alive) == 0


def test_a_missing_file_is_not_dropped(tmp_path: Path) -> None:
    assert drop_cache([tmp_path / "nothing"]) is False
    assert find_resident(tmp_path / "nothing") is None
