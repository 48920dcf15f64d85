"""What `--on` is made of, without a device: addresses, fleets, packages, the helper, throttling."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from half_made import find_half_made
from test_bench_compare import make_run, write_document

from lime_edge.bench.compare import compare_files
from lime_edge.bench.devices import join_devices, tabulate_devices
from lime_edge.bench.measure import SCHEMA
from lime_edge.bench.plots import PLOTS, render
from lime_edge.bench.remote.addresses import gather_devices, parse_address, read_hosts
from lime_edge.bench.remote.pack import pack_helper
from lime_edge.bench.remote.package import Package, fits
from lime_edge.bench.remote.probe import LEAST_MEMORY, Facts, find_lacks
from lime_edge.bench.remote.task import read_error
from lime_edge.bench.remote.there.bundles import find_contents
from lime_edge.bench.remote.there.wire import Refusal
from lime_edge.bench.throttling import State, find_throttling, read_state, read_tegrastats
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]


# addresses


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ssh://raspberrypi", ("ssh", "raspberrypi", None, None, None)),
        ("ssh://pi@raspberrypi:2222", ("ssh", "raspberrypi", "pi", 2222, None)),
        ("ssh://Desk-Pi", ("ssh", "Desk-Pi", None, None, None)),  # a Host of the configuration: letter case counts
        ("ssh://pi@[fe80::1]:22", ("ssh", "fe80::1", "pi", 22, None)),
        ("ssh://[fe80::1]", ("ssh", "fe80::1", None, None, None)),
        ("adb", ("adb", "", None, None, None)),
        ("adb:R5CT123", ("adb", "", None, None, "R5CT123")),
        ("adb:192.168.1.7:5555", ("adb", "", None, None, "192.168.1.7:5555")),
    ],
)
def test_addresses(address: str, expected: tuple[Any, ...]) -> None:
    device = parse_address(address)
    assert (device.kind, device.host, device.user, device.port, device.serial) == expected


@pytest.mark.parametrize(
    "address",
    [
        "pi@raspberrypi",
        "ssh://",
        "http://x",
        "ssh://x/path",
        "ssh://x:port",
        "ssh://-oProxyCommand=x",
        "adb:",
        "adb:a b",
    ]
    + ["ssh://-x@host", "ssh://x?y", ""],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(LimeEdgeError, match="address"):
        parse_address(address)


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(LimeEdgeError, match="holds a password") as caught:
        parse_address("ssh://pi:hunter2@raspberrypi")
    assert "hunter2" not in str(caught.value)


def test_a_hosts_file(tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(
        '[[device]]\nname = "pi 5"\naddress = "ssh://pi@pi5"\nfolder = "/mnt/x"\n\n'
        '[[device]]\nname = "phone"\naddress = "adb:1"\npackage = "my.app"\n'
    )
    pi, phone = gather_devices([], file, "/usr/bin/python3.12", True)
    assert (pi.name, pi.host, pi.folder, pi.python, pi.site_packages) == (
        ("pi 5", "pi5", "/mnt/x", "/usr/bin/python3.12", True)
    )
    assert (phone.serial, phone.package) == ("1", "my.app")
    with pytest.raises(LimeEdgeError, match="phone: each device once"):
        gather_devices(["adb:2", "ssh://phone"], file)


def test_all_faults_of_a_hosts_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(
        'colour = 1\n[[device]]\nname = "a"\naddress = "nowhere"\n[[device]]\nname = "-"\nadress = "ssh://x"\n'
        '[[device]]\nname = "b"\naddress = "ssh://x:secret@y"\n[[device]]\nname = "c"\naddress = "ssh://y"\n'
        "folder = 3\n"
        '[[device]]\nname = "d"\naddress = "ssh://y"\n[[device]]\nname = "d"\naddress = "ssh://z"\n'
    )
    with pytest.raises(LimeEdgeError) as caught:
        read_hosts(file)
    told = str(caught.value)
    for text in (
        *("colour is not known", "device 1: address: 'nowhere' is no address", "device 2: address is missing"),
        *(
            "did you mean 'address'?",
            "device 2: name: expected letters",
            "device 3: address: ssh://x@y: the address holds",
        ),
        *("device 4: folder: expected a text, found 3", "device 6: name: expected each once"),
    ):
        assert text in told, told
    assert "secret" not in told
    file.write_text("")
    with pytest.raises(LimeEdgeError, match="one table or more"):
        read_hosts(file)


# the command line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["bench", "x.lime", "--clean"], "--clean is for a device"),
        (["verify", "x.lime", "--site-packages"], "--site-packages is for a device"),
        (["bench", "--compare", __file__, __file__, "--on", "adb"], "--compare takes two files"),
        (["bench", "x.lime", "--on", "nowhere"], "x.lime: no such bundle"),
        (["doctor", "--on", "nowhere"], "'nowhere' is no address"),
        (["doctor", "--hosts", "/nowhere.toml"], "/nowhere.toml: no such file"),
    ],
)
def test_bad_command_lines(
    words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lime-edge", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and text in capsys.readouterr().err


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, address in (("asyncssh", "ssh://x"), ("adbutils", "adb")):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(sys, "argv", ["lime-edge", "doctor", "--on", address])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out = capsys.readouterr().out
        assert caught.value.code == 4 and "pip install 'lime-edge[remote]'" in out


def test_an_error_of_the_device_keeps_problem_and_hint() -> None:
    said = "warning: something\nerror: /root/.lime-edge/b/x.lime: 2 faults\n  - a\n  - b\n  hint: copy it again\n"
    error = read_error("pi", said, 2, {"/root/.lime-edge/b/x.lime": "x.lime"})
    assert error.problem == "pi: x.lime on pi: 2 faults\n  - a\n  - b" and error.hint == "copy it again"
    assert error.exit_code == 2
    killed = read_error("pi", "", 137, {})
    assert "ended with 137" in killed.problem and "memory" in killed.hint


# what a device lacks


def test_all_that_a_device_lacks_is_named() -> None:
    facts = Facts(
        "/home/pi/.lime-edge",
        "Linux",
        "armv7l",
        None,
        LEAST_MEMORY - 1,
        (("3.9.2", "/usr/bin/python3"),),
        (),
        "",
        False,
    )
    device = parse_address("ssh://pi")
    lacks = {what: f"{found} {hint}" for what, found, hint in find_lacks(device, facts)}
    assert set(lacks) == {"processor", "Python", "memory"}
    assert "64-bit image" in lacks["processor"] and "found 3.9.2 (/usr/bin/python3)" in lacks["Python"]
    good = replace(facts, arch="aarch64", memory=10**9, pythons=(("3.9.2", "/a"), ("3.11.2", "/b"), ("3.14.0", "/c")))
    assert find_lacks(device, good) == [] and good.python == "/b"
    assert [what for what, *_ in find_lacks(device, replace(good, system="FreeBSD", readonly="/home"))] == (
        ["system", "folder"]
    )


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("lime_edge-0.1.0-cp311-cp311-linux_x86_64.whl", ("cp311", "linux_x86_64", [9, 9]), True),
        ("lime_edge-0.1.0-cp311-cp311-linux_x86_64.whl", ("cp311", "linux_aarch64", [9, 9]), False),
        ("lime_edge-0.1.0-cp311-cp311-linux_x86_64.whl", ("cp312", "linux_x86_64", [9, 9]), False),
        (
            "lime_edge-0.1.0-cp311-cp311-linux_x86_64.whl",
            ("cp311", "linux_x86_64", [2, 1]),
            False,
        ),  # an older C library
        ("lime_edge-0.1.0-cp311-cp311-manylinux_2_28_aarch64.whl", ("cp311", "linux_aarch64", [2, 31]), True),
        ("lime_edge-0.1.0-py3-none-any.whl", ("cp313", "macosx_14_0_arm64", []), True),
        ("lime_edge-0.1.0.tar.gz", ("cp311", "linux_x86_64", [9, 9]), False),
    ],
)
def test_which_wheel_fits(name: str, there: tuple[str, str, list[int]], expected: bool) -> None:
    facts = dict(zip(("tag", "platform", "libc"), there, strict=True))
    assert fits(name, facts) is expected
    sources = Path("lime_edge-0.1.0.tar.gz")
    assert Package("k", (Path(name), sources)).choose(facts) == (Path(name) if expected else sources)


# the helper


def call_helper(root: Path, verb: str, request: dict[str, Any], body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """The helper as a device runs it: the packed file, by a Python without this repository."""
    name, data = pack_helper()
    file = root.parent / name
    file.write_bytes(data)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(file), verb, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(request).encode() + b"\n" + body)
    process.stdin.flush()
    out = process.stdout.read()  # its input stays open until it has answered
    process.stdin.close()
    return process.wait(), json.loads(out) if out else {}


def frame(data: bytes, sha256: str | None = None) -> bytes:
    digest = sha256 or hashlib.sha256(data).hexdigest()
    return json.dumps({"sha256": digest, "size": len(data)}).encode() + b"\n" + data


def test_the_helper_needs_the_standard_library_alone() -> None:
    _, data = pack_helper()
    assert len(data) < 20_000
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        texts = [archive.read(name).decode() for name in archive.namelist()]
    lines = {
        line.split()[1].split(".")[0] for text in texts for line in text.splitlines() if line.startswith("import ")
    }
    lines |= {line.split()[1] for text in texts for line in text.splitlines() if line.startswith("from ")}
    ours = {name for name in lines if name.startswith("lime_edge")}
    assert all(name.startswith("lime_edge.bench.remote.there") for name in ours)
    assert {name.split(".")[0] for name in lines - ours} <= set(sys.stdlib_module_names)


def test_files_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    root = tmp_path / "root"
    data = bytes(range(256)) * 2000
    name = hashlib.sha256(data).hexdigest()
    code, _ = call_helper(root, "receive", {"count": 1, "bytes": len(data)}, frame(data))
    assert code == 0 and (root / "incoming" / name).read_bytes() == data
    code, answer = call_helper(root, "receive", {"count": 1, "bytes": 3}, frame(b"abc", "0" * 64))
    assert code == 5 and "another sha256" in answer["problem"]
    code, answer = call_helper(root, "receive", {"count": 1, "bytes": 1 << 60})
    assert code == 5 and "are to be brought" in answer["problem"] and "disk is full" in answer["hint"]
    assert [path.name for path in (root / "incoming").iterdir()] == [name]


def test_the_helper_waits_for_another_one(tmp_path: Path) -> None:
    """Two workstations, one device: the second waits; what a killed one left is swept."""
    import fcntl

    root = tmp_path / "root"
    (root / "env" / ".x.0000.partial").mkdir(parents=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name, data = pack_helper()
        (tmp_path / name).write_bytes(data)
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / name), "compare", str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"files": {}}).encode() + b"\n")
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert (root / "env" / ".x.0000.partial").exists(), "somebody alive may be making it"
    assert json.loads(process.stdout.read()) == {"missing": []}
    process.stdin.close()
    assert process.wait() == 0 and find_half_made(root) == []


def test_a_helper_whose_other_side_goes_undoes_what_it_began(tmp_path: Path) -> None:
    root = tmp_path / "root"
    name, data = pack_helper()
    (tmp_path / name).write_bytes(data)
    process = subprocess.Popen([sys.executable, str(tmp_path / name), "receive", str(root)], stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(json.dumps({"count": 1, "bytes": 1 << 20}).encode() + b"\n" + frame(bytes(1 << 20))[:-5])
    process.stdin.close()
    assert process.wait(20) == 141
    assert find_half_made(root) == [] and not list((root / "incoming").iterdir())


def test_a_damaged_file_is_no_source(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in ("incoming", "bundles/0/b.lime"):
        (root / folder).mkdir(parents=True)
    digest = hashlib.sha256(b"good").hexdigest()
    place = root / "bundles" / "0" / "b.lime"
    (place / "x").write_bytes(b"good")
    (place / "lime.json").write_text(json.dumps({"files": {"x": {"sha256": digest}}}))
    (place.parent / "arrived.json").write_text(json.dumps({"x": [0, 0, 0]}))
    assert find_contents(root, {digest}) == {digest: place / "x"}, "other marks, the same bytes"
    (place / "x").write_bytes(b"evil")
    assert find_contents(root, {digest}) == {}
    assert isinstance(Refusal("a").answer, dict)


# several devices


@pytest.fixture
def fleet(tmp_path: Path) -> dict[str, Any]:
    slow = make_run(decode=20.0, peak=100_000_000, energy={"decode_joules_per_token": 0.02}, temperature_c=None)
    fast = make_run(decode=5.0, energy={"decode_joules_per_token": 0.5}, temperature_c={"before": 40.0, "after": 81.0})
    entries = []
    for name, run, throttled in (("pi4", slow, []), ("pi5", fast, ["under-voltage"])):
        file = write_document(
            tmp_path / f"{name}.json", run, bundle="x.lime", repeat=5, throttled=throttled, lime_edge="0", created="now"
        )
        facts = json.loads(file.read_text())
        entries.append({"name": name, "address": f"ssh://{name}", "error": None, "document": facts})
    error = {"problem": "off: cannot connect\nmore", "hint": "", "exit_code": 4}
    entries.append({"name": "off", "address": "ssh://off", "error": error, "document": None})
    return {"schema": SCHEMA, "lime_edge": "0", "created": "now", "devices": entries}


def test_devices_are_rows(fleet: dict[str, Any]) -> None:
    table = tabulate_devices(fleet)
    rows = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    assert [row["device"] for row in rows] == ["pi4", "pi5", "off"]
    assert [row["decode, tokens/s"] for row in rows] == ["50.0", "200.0", "-"]
    assert [row["peak memory"] for row in rows] == ["100.0 MB", "200.0 MB", "-"]
    assert [row["decode, J/token"] for row in rows] == ["0.02", "0.5", "-"]
    assert [row["throttled"] for row in rows] == ["no", "under-voltage", "-"]
    assert rows[2]["run"] == "failed: off: cannot connect"
    assert "call p50, ms" not in table.headers, "what nobody has is left out"
    nobody = fleet | {"devices": fleet["devices"][2:]}
    assert "none measured" in tabulate_devices(nobody).title and join_devices(nobody) is None


def test_devices_are_drawn_beside_each_other(fleet: dict[str, Any]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    joined = join_devices(fleet)
    assert joined is not None
    for name, values in (
        ("decode", [50, 200]),
        ("first_token", [100, 100]),
        ("peak_memory", [100, 200]),
        ("energy", [0.02, 0.5]),
    ):
        axes = Figure().add_subplot()
        assert PLOTS[name].draw(axes, joined["runs"]), name
        assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == pytest.approx(values), name
        assert [label.get_text() for label in axes.get_yticklabels()] == ["pi4", "pi5 (throttled)"], name
    assert render(PLOTS["decode"], joined) is not None
    axes = Figure().add_subplot()
    assert not PLOTS["peak_memory"].draw(axes, fleet["devices"][0]["document"]["runs"]), "one machine: by stage says it"


def test_a_fleet_is_compared_device_by_device(fleet: dict[str, Any], tmp_path: Path) -> None:
    a, b, alone = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "pi4.json"
    a.write_text(json.dumps(fleet))
    b.write_text(json.dumps(fleet | {"devices": [fleet["devices"][1]]}))
    found = compare_files(a, b)
    assert [entry["run"].split(":")[0] for entry in found["runs"]] == ["pi5"]
    assert any("devices in one document only: pi4" in text for text in found["warnings"])
    assert any("A was throttled: under-voltage" in text for text in found["warnings"])
    beside = compare_files(alone, a)
    assert [entry["run"].split(":")[0] for entry in beside["runs"]] == ["pi4", "pi5"]
    ratios = [next(m["ratio"] for m in e["metrics"] if m["metric"] == "decode_tokens_per_s") for e in beside["runs"]]
    assert ratios == pytest.approx([1.0, 4.0])
    (tmp_path / "none.json").write_text(json.dumps(fleet | {"devices": fleet["devices"][2:]}))
    with pytest.raises(LimeEdgeError, match="every device failed"):
        compare_files(a, tmp_path / "none.json")
    other = fleet["devices"][0] | {"name": "pi3"}
    b.write_text(json.dumps(fleet | {"devices": [other]}))
    with pytest.raises(LimeEdgeError, match="no device in common"):
        compare_files(a, b)


# throttling


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_pis_flags(tmp_path: Path) -> None:
    """0x50005: under-voltage and throttled, now and since boot (bits 0 and 2, 16 and 18)."""
    firmware = "devices/platform/soc/soc:firmware/get_throttled"
    write(tmp_path, firmware, "0\n")
    before = read_state(tmp_path)
    assert before.flags == before.past == () and find_throttling(before, before) == []
    write(tmp_path, firmware, "50005\n")
    after = read_state(tmp_path)
    assert after.flags == after.past == ("under-voltage", "throttled")
    assert find_throttling(before, after) == ["under-voltage", "throttled"]
    write(tmp_path, firmware, "80000\n")  # since boot alone: it came and went in between
    assert find_throttling(before, read_state(tmp_path)) == ["soft temperature limit"]
    assert find_throttling(read_state(tmp_path), read_state(tmp_path)) == [], "it was before: no news"


def test_cooling_counts_and_rails(tmp_path: Path) -> None:
    nothing = read_state(tmp_path)
    assert find_throttling(nothing, nothing) is None, "a machine that tells nothing"
    assert nothing == State(None, None, None, None, None, None, None)
    write(tmp_path, "class/thermal/cooling_device0/type", "cpufreq-cpu0\n")
    write(tmp_path, "class/thermal/cooling_device0/cur_state", "0\n")
    write(tmp_path, "class/thermal/cooling_device0/max_state", "9\n")
    write(tmp_path, "class/thermal/cooling_device1/type", "pwm-fan\n")  # a fan that turns slows nothing down
    write(tmp_path, "class/thermal/cooling_device1/cur_state", "3\n")
    write(tmp_path, "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "7\n")
    write(tmp_path, "devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n")
    write(tmp_path, "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1500000\n")
    write(tmp_path, "class/hwmon/hwmon2/oc1_event_cnt", "1\n")
    for name, text in (("name", "ina3221"), ("in1_input", "5000"), ("curr1_input", "1500"), ("in1_label", "VDD_IN")):
        write(tmp_path, f"class/hwmon/hwmon3/{name}", text)
    before = read_state(tmp_path)
    assert (before.governor, before.clock_mhz, before.rails_watts) == ("ondemand", 1500.0, {"VDD_IN": 7.5})
    assert find_throttling(before, before) == []
    write(tmp_path, "class/thermal/cooling_device0/cur_state", "2\n")
    write(tmp_path, "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "9\n")
    write(tmp_path, "class/hwmon/hwmon2/oc1_event_cnt", "2\n")
    assert find_throttling(before, read_state(tmp_path)) == (
        ["cpufreq-cpu0 cooled, state 2 of 9", "thermal throttling of the core: 2 times", "over-current oc1: 1 times"]
    )


def test_a_line_of_tegrastats() -> None:
    line = (
        "01-02-2026 RAM 3000/7620MB CPU [12%@1510,off] GR3D_FREQ 0% cpu@45C VDD_IN 4996mW/5012mW VDD_SOC 1439mW/1440mW"
    )
    assert read_tegrastats(line) == {"VDD_IN": 4.996, "VDD_SOC": 1.439}
