"""`--on ssh://...` against a real openssh-server on loopback: bench, verify, run, doctor, fleets, keys, faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from half_made import find_half_made
from sshd import SSHD, Sshd, make_key, serve

from lime_edge.bench.tables import flatten

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server"),
]
Make = Callable[..., Path]
BORROW = ("--python", sys.executable, "--site-packages")  # the device is this machine: its packages are here
QUICK = ("--prompt-tokens", "6", "--gen-tokens", "3", "--repeat", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("ssh"), shared_folder / "cache") as running:
        yield running


@pytest.fixture
def device(server: Sshd) -> Iterator[Sshd]:
    """The server, its client's files as they should be."""
    server.write_client()
    server.wire.reset()
    yield server
    assert find_half_made(server.root) == []


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make) -> Path:
    return tiny_bundle()


@pytest.fixture(scope="module")
def measured(server: Sshd, bundle: Path) -> dict[str, Any]:
    """The first run on the device, on a device where nothing was."""
    server.write_client()
    shutil.rmtree(server.root, ignore_errors=True)
    done = server.run("bench", str(bundle), *QUICK, "--on", server.address, *BORROW, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def on(server: Sshd) -> tuple[str, ...]:
    return ("--on", server.address, *BORROW)


def copy(bundle: Path, folder: Path) -> Path:
    """A bundle to write to, under its own name."""
    return Path(shutil.copytree(bundle, folder / bundle.name))


def find_there(server: Sshd, bundle: Path) -> Path:
    """The bundle's folder on the device."""
    (place,) = server.root.glob(f"bundles/*/{bundle.name}")
    return place


# bench


def test_a_device_answers_with_the_document_of_this_machine(
    device: Sshd, bundle: Path, measured: dict[str, Any]
) -> None:
    here = json.loads(device.run("bench", str(bundle), *QUICK, "--json").stdout)
    keys = {key for key in flatten(measured) if not key.startswith("device.")} | {"device"}
    assert keys == set(flatten(here)), "the same schema"
    for key in ("schema", "model", "fingerprint", "expert", "target", "bundle", "bundle_bytes", "prompt_tokens"):
        assert measured[key] == here[key], key
    assert list(measured) == list(here), "in the same order"
    assert here["device"] is None and measured["device"]["name"] == "desk-device"
    assert measured["device"]["sent_bytes"] > measured["bundle_bytes"], "the bundle and lime-edge went over the wire"
    assert measured["runs"][0]["rounds"]["decode_ms"], "it was measured there"


def test_the_second_run_sends_nothing(device: Sshd, bundle: Path, measured: dict[str, Any]) -> None:
    again = json.loads(device.run("bench", str(bundle), *QUICK, *on(device), "--json").stdout)
    assert again["device"]["sent_bytes"] == 0
    smallest = max(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    assert device.wire.sent < 30_000 < smallest, "counted on the wire: keys, commands and requests"


def test_only_what_changed_is_sent(device: Sshd, bundle: Path, measured: dict[str, Any], tmp_path: Path) -> None:
    changed = copy(bundle, tmp_path)
    device.run("experts", "remove", str(changed), "expert3")
    less = json.loads(device.run("bench", str(changed), *QUICK, *on(device), "--json").stdout)
    assert less["device"]["sent_bytes"] == 0, "a manifest that names fewer files: nothing new"
    assert len(list(device.root.glob(f"bundles/*/{bundle.name}"))) == 1, "the earlier state is gone"
    more = json.loads(device.run("bench", str(bundle), *QUICK, *on(device), "--json").stdout)
    gone = {file.name for file in bundle.rglob("*expert3*")}
    sizes = sum(file.stat().st_size for file in bundle.rglob("*") if file.name in gone)
    assert gone and 0 < more["device"]["sent_bytes"] < sizes + 200 * len(gone)
    assert find_there(device, bundle).joinpath("lime.json").read_bytes() == (bundle / "lime.json").read_bytes()


def test_options_and_a_baseline_reach_the_device(device: Sshd, tiny_bundle: Make, bundle: Path) -> None:
    single = tiny_bundle(fold="expert1", single=True)
    words = (
        "bench",
        str(bundle),
        "--expert",
        "expert1",
        "--prompt-tokens",
        "6,9",
        "--gen-tokens",
        "3",
        "--repeat",
        "2",
    )
    done = device.run(*words, "--depth", "7", "--baseline", str(single), *on(device), "--json")
    document = json.loads(done.stdout)
    assert [run["prompt_tokens"] for run in document["runs"]] == [6, 9]
    assert {run["expert"] for run in document["runs"]} == {"expert1"} and document["depth"] == 7
    assert {run["baseline"]["bundle"] for run in document["runs"]} == {str(single)}


def test_clean_leaves_nothing(device: Sshd, bundle: Path) -> None:
    device.run("bench", str(bundle), *QUICK, *on(device), "--clean", "--quiet")
    assert not device.root.exists()
    done = device.run("bench", *on(device), "--clean")
    assert not device.root.exists() and "deleted there" in done.stderr


# verify, run, doctor


@pytest.mark.parametrize("damage", ["silent", "cut short", "missing"])
def test_verify_finds_a_bundle_damaged_on_the_device(device: Sshd, bundle: Path, damage: str) -> None:
    device.run("verify", str(bundle), *on(device))
    file = find_there(device, bundle) / "onnx" / "model.onnx.data"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data if damage == "silent" else data[:-7])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of a file tells nothing
    found = device.run("verify", str(bundle), *on(device), "--json", check=False)
    assert found.returncode == 2 and not found.stdout
    assert re.search(r"error: desk-device: .*onnx/model\.onnx\.data", found.stderr, re.DOTALL)
    again = device.run("verify", str(bundle), *on(device), check=False)
    assert again.returncode == 2, "verify mends nothing"
    mended = device.run("bench", str(bundle), *QUICK, *on(device), "--json")
    assert "brought again: onnx/model.onnx.data" in mended.stderr
    assert json.loads(mended.stdout)["device"]["sent_bytes"] >= before.st_size
    assert device.run("verify", str(bundle), *on(device)).returncode == 0


def test_verify_says_what_it_says_here(device: Sshd, bundle: Path) -> None:
    here = json.loads(device.run("verify", str(bundle), "--target", "onnx", "--json").stdout)
    there = json.loads(device.run("verify", str(bundle), "--target", "onnx", *on(device), "--json").stdout)
    assert there == here
    table = device.run("verify", str(bundle), "--expert", "none", *on(device)).stdout
    assert (
        " files as they were written" in table
        and "desk-device" in table
        and "1 checked, 1 as PyTorch computed them" in table
    )


def test_run_answers_as_here(device: Sshd, bundle: Path) -> None:
    words = (
        "run",
        str(bundle),
        "a prompt with 'quotes' and $HOME",
        "--max-new-tokens",
        "5",
        "--raw",
        "--expert",
        "none",
    )
    assert device.run(*words, *on(device)).stdout == device.run(*words).stdout
    answer = json.loads(device.run(*words, *on(device), "--json").stdout)
    assert answer == json.loads(device.run(*words, "--json").stdout) | {
        key: value for key, value in answer.items() if key.endswith(("_s", "_ms", "seconds"))
    }
    refused = device.run("run", str(bundle), *on(device), check=False)
    assert refused.returncode == 2 and "a prompt is missing" in refused.stderr


def test_an_error_there_is_an_error_here(device: Sshd, bundle: Path) -> None:
    words = ("run", str(bundle), "x", "--expert", "expret1")
    there, here = device.run(*words, *on(device), check=False), device.run(*words, check=False)
    assert there.returncode == here.returncode == 2
    assert there.stderr.replace("desk-device: ", "") == f"\n{here.stderr}"


def test_doctor_names_what_is_missing_there(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(device.root, ignore_errors=True)
    told = device.run("doctor", str(bundle), *on(device)).stdout
    assert "environment: not made yet" in told and "is not there" in told
    assert not list(device.root.glob("env/*")), "a doctor installs nothing"
    absent = device.run("doctor", "--on", device.address, "--python", "python9.9", check=False)
    assert absent.returncode == 4 and "Python: expected 3.11 to 3.13, found no python9.9" in absent.stdout
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    poor = device.run(
        "doctor", "--on", device.address, "--python", str(bare / "bin" / "python"), "--site-packages", check=False
    )
    assert poor.returncode == 4 and "onnxruntime is missing" in poor.stdout
    device.run("verify", str(bundle), *on(device))
    whole = json.loads(device.run("doctor", str(bundle), *on(device), "--json").stdout)
    assert "onnx" in whole["engines"] and whole["exit_code"] == 0
    found = {(one["topic"], one["what"]): one["state"] for one in whole["findings"]}
    assert found["device", "environment"] == found["bundle", "on onnx"] == "good"


@pytest.mark.parametrize("command", ["bench", "verify", "doctor"])
def test_a_missing_python_is_said_before_anything_is_sent(device: Sshd, bundle: Path, command: str) -> None:
    shutil.rmtree(device.root, ignore_errors=True)
    words = (command, str(bundle), "--on", device.address, "--python", "/nowhere/python3.11")
    done = device.run(*words, check=False)
    assert done.returncode == 4 and "Python: expected 3.11 to 3.13" in done.stderr + done.stdout
    assert not device.root.exists()


# keys


def test_an_unknown_host_is_refused(device: Sshd, bundle: Path) -> None:
    device.write_client(known="")
    done = device.run("bench", str(bundle), *on(device), check=False)
    fingerprint = subprocess.run(["ssh-keygen", "-lf", device.folder / "host_key.pub"], capture_output=True, text=True)
    assert done.returncode == 4 and "the host's key is not known" in done.stderr
    assert fingerprint.stdout.split()[1] in done.stderr, "the key that was shown, to compare"
    assert not done.stdout


def test_a_changed_host_key_is_refused(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    device.write_client(known=make_key(tmp_path / "other", "other"))
    done = device.run("bench", str(bundle), *on(device), check=False)
    assert done.returncode == 4 and "the host's key is another one than known_hosts has" in done.stderr
    assert "ssh-keygen -R" in done.stderr and not done.stdout


@pytest.mark.parametrize("setting", ["UserKnownHostsFile none", "UserKnownHostsFile /dev/null"])
def test_no_configuration_turns_the_check_off(device: Sshd, bundle: Path, setting: str) -> None:
    device.write_client(extra=f"    {setting}\n    StrictHostKeyChecking no\n")
    done = device.run("doctor", *on(device), check=False)
    assert done.returncode == 4
    assert "turns the check of host keys off" in done.stdout or "host's key is not known" in done.stdout


def test_a_key_that_is_not_accepted(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger", "stranger")
    device.write_client(extra=f"    IdentityFile {tmp_path}/stranger\n    IdentitiesOnly yes\n")
    done = device.run("bench", str(bundle), *on(device), check=False)
    assert done.returncode == 4 and "no key of yours is accepted there" in done.stderr


def test_no_secret_is_written_anywhere(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    """The private key, and a password somebody typed into an address: in no file, no output, no process's words."""
    private = (device.user_home / ".ssh" / "id_ed25519").read_text().splitlines()[2:-1]  # the first line names the kind
    secret = "correct-horse-battery"
    done = [
        device.run("bench", str(bundle), *QUICK, *on(device), "--json"),
        device.run("bench", str(bundle), "--on", f"ssh://pi:{secret}@127.0.0.1", check=False),
        device.run("doctor", "--on", f"ssh://pi:{secret}@127.0.0.1", "--json", check=False),
    ]
    assert [one.returncode for one in done] == [0, 2, 2]
    assert "holds a password" in done[1].stderr
    texts = [text for one in done for text in (one.stdout, one.stderr)]
    hosts = tmp_path / "hosts.toml"
    hosts.write_text(f'[[device]]\nname = "pi"\naddress = "ssh://pi:{secret}@127.0.0.1"\n')
    refused = device.run("bench", str(bundle), "--hosts", str(hosts), check=False)
    assert refused.returncode == 2
    for text in [*texts, refused.stdout, refused.stderr]:
        assert secret not in text and not any(line in text for line in private)
    hosts.unlink()
    own = {device.user_home / ".ssh" / "id_ed25519"}
    places = [device.folder, device.cache]
    files = [file for place in places for file in place.rglob("*") if file.is_file() and file not in own]
    assert len(files) > 30
    for file in files:
        data = file.read_bytes()
        assert secret.encode() not in data, file
        assert not any(line.encode() in data for line in private), file


# fleets


def test_a_fleet_in_one_document(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "desk.toml"
    one = f'address = "{device.address}"\npython = "{sys.executable}"\nsite_packages = true\n'
    hosts.write_text(
        f'[[device]]\nname = "pi5"\n{one}\n[[device]]\nname = "off"\naddress = "ssh://127.0.0.1:9"\n\n'
        f'[[device]]\nname = "pi4"\n{one}folder = "{device.home}/other place"\n'
    )
    fleet, report = tmp_path / "fleet.json", tmp_path / "report"
    done = device.run(
        "bench", str(bundle), *QUICK, "--hosts", str(hosts), "--json", "--report", str(report), check=False
    )
    assert done.returncode == 4, "one device failed"
    fleet.write_text(done.stdout)
    document = json.loads(done.stdout)
    assert [entry["name"] for entry in document["devices"]] == ["pi5", "off", "pi4"]
    failed = document["devices"][1]
    assert failed["document"] is None and failed["error"]["exit_code"] == 4
    assert "cannot connect" in failed["error"]["problem"] and "off" in done.stderr
    for entry in (document["devices"][0], document["devices"][2]):
        assert entry["error"] is None and entry["document"]["decode_tokens_per_s"] > 0
        assert entry["document"]["device"]["name"] == entry["name"]
    page = (report / "index.html").read_text()
    assert "pi5" in page and "pi4" in page and "failed: " in page
    assert {path.stem for path in report.glob("*.png")} >= {"decode", "first_token", "peak_memory"}
    table = device.run("bench", str(bundle), *QUICK, "--hosts", str(hosts), "--md", check=False).stdout
    rows = [line for line in table.splitlines() if line.startswith(("| pi", "| off"))]
    assert len(rows) == 3 and "failed" in rows[1] and "decode, tokens/s" in table
    compared = json.loads(device.run("bench", "--compare", str(fleet), str(fleet), "--json").stdout)
    assert [entry["run"].split(":")[0] for entry in compared["runs"]] == ["pi5", "pi4"]
    assert {metric["ratio"] for entry in compared["runs"] for metric in entry["metrics"]} == {1.0}
    shutil.rmtree(device.home / "other place")


def test_several_devices_verify_and_run(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "desk.toml"
    hosts.write_text(
        "".join(
            f'[[device]]\nname = "{name}"\naddress = "{device.address}"\npython = "{sys.executable}"\n'
            f'site_packages = true\nfolder = "{device.home}/{name}"\n'
            for name in ("a", "b")
        )
    )
    checked = json.loads(device.run("verify", str(bundle), "--hosts", str(hosts), "--json").stdout)
    assert [entry["document"]["passed"] for entry in checked["devices"]] == [True, True]
    answers = device.run("run", str(bundle), "x", "--raw", "--max-new-tokens", "2", "--hosts", str(hosts)).stdout
    assert answers.startswith("a: ") and "\nb: " in answers
    told = device.run("doctor", "--hosts", str(hosts)).stdout
    assert told.count("device, environment") == 2
    for name in ("a", "b"):
        shutil.rmtree(device.home / name)


# faults


def test_ctrl_c_says_what_was_going_on(device: Sshd, bundle: Path) -> None:
    words = ("bench", str(bundle), "--prompt-tokens", "32", "--gen-tokens", "64", "--repeat", "5000")
    process = device.start(*words, *on(device))
    _wait_for(
        lambda: any(b"bench" in read_words(pid) and b"lime_edge" in read_words(pid) for pid in device.find_helpers())
    )
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not out
    assert "desk-device: stopped while running lime-edge bench" in err
    _wait_for(lambda: not device.find_helpers())


def is_measuring(server: Sshd) -> bool:
    """Whether lime-edge bench itself runs on the device."""
    words = [read_words(pid) for pid in server.find_helpers()]
    return any(b"lime_edge\0bench" in one for one in words)


def read_words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _wait_for(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that within 30 s")


def test_a_lost_connection_is_said(device: Sshd, bundle: Path) -> None:
    process = device.start("bench", str(bundle), "--gen-tokens", "64", "--repeat", "5000", *on(device))
    _wait_for(
        lambda: any(b"bench" in read_words(pid) and b"lime_edge" in read_words(pid) for pid in device.find_helpers())
    )
    device.wire.cut()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 4 and not out
    assert "the connection was lost while running lime-edge bench" in err
    _wait_for(lambda: not device.find_helpers())


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_leaves_nothing(device: Sshd, bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    hosts = tmp_path / "hosts.toml"
    hosts.write_text(
        f'[[device]]\nname = "small"\naddress = "{device.address}"\npython = "{sys.executable}"\n'
        f'site_packages = true\nfolder = "{disk}/lime"\n'
    )
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = device.run("verify", str(bundle), "--hosts", str(hosts), check=False)
        assert done.returncode == 5 and "small: making the environment" in done.stderr and "disk is full" in done.stderr
        assert find_half_made(disk / "lime") == [] and not list((disk / "lime" / "env").iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        device.run("run", str(bundle), "x", "--max-new-tokens", "1", "--hosts", str(hosts))
        shutil.rmtree(disk / "lime" / "bundles")
        free = shutil.disk_usage(disk).free
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(free - 200_000))
        done = device.run("verify", str(bundle), "--hosts", str(hosts), check=False)
        assert done.returncode == 5 and "are to be brought" in done.stderr and "disk is full" in done.stderr
        assert find_half_made(disk / "lime") == [] and not list((disk / "lime" / "incoming").iterdir())
        (disk / "filler").unlink()
        device.run("verify", str(bundle), "--hosts", str(hosts))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
