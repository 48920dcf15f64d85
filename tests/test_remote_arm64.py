"""`--on ssh://` into an arm64 Debian under emulation, as into a Raspberry Pi; its environment comes from the index.

`make test-remote-arm64` runs it: tools/test_arm64.sh makes and mounts the root. Minutes, for everything is emulated.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from half_made import find_half_made
from sshd import SSHD, Sshd, serve

from lime_edge.bench.tables import flatten

ROOT = os.environ.get("LIME_EDGE_ARM64_ROOT", "")
pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(not ROOT, reason="minutes under emulation: make test-remote-arm64"),
    pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server"),
]
Make = Callable[..., Path]
QUICK = ("--prompt-tokens", "6", "--gen-tokens", "3", "--repeat", "2")
KEPT = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "QEMU_CPU")
FOLDER = "/root/.lime-edge"


@pytest.fixture(scope="module")
def pi(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Sshd]:
    folder = tmp_path_factory.mktemp("pi")
    settings = {key: os.environ[key] for key in KEPT if key in os.environ}
    settings |= {"PATH": "/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    settings |= {"PIP_CERT": "/etc/ssl/certs/ca-certificates.crt"}
    words = [
        "chroot",
        ROOT,
        "/usr/bin/env",
        "-i",
        *(f"{key}={value}" for key, value in settings.items()),
        "/bin/sh",
        "-c",
    ]
    login = folder / "login"
    login.write_text(f'#!/bin/sh\nexec {" ".join(map(shlex.quote, words))} "cd; $SSH_ORIGINAL_COMMAND"\n')
    login.chmod(0o755)
    with serve(folder / "sshd", shared_folder / "cache", str(login)) as running:
        yield running


def test_an_emulated_pi(pi: Sshd, tiny_bundle: Make) -> None:
    bundle, there = tiny_bundle(), Path(ROOT + FOLDER)
    pi.run("bench", "--on", pi.address, "--clean", check=False)
    told = pi.run("doctor", "--on", pi.address).stdout
    assert "processor: aarch64" in told and "environment: not made yet" in told
    times = {}
    begin = time.monotonic()
    document = json.loads(pi.run("bench", str(bundle), *QUICK, "--on", pi.address, "--json").stdout)
    times["first run"] = time.monotonic() - begin
    here = json.loads(pi.run("bench", str(bundle), *QUICK, "--json").stdout)
    assert {key for key in flatten(document) if not key.startswith("device.")} | {"device"} == set(flatten(here))
    assert document["machine"]["arch"] == "aarch64" and here["machine"]["arch"] != "aarch64"
    assert document["operators"] is True, "built there from the sources"
    assert document["device"]["sent_bytes"] > document["bundle_bytes"]
    pi.wire.reset()
    begin = time.monotonic()
    again = json.loads(pi.run("bench", str(bundle), *QUICK, "--on", pi.address, "--json").stdout)
    times["second run"] = time.monotonic() - begin
    assert again["device"]["sent_bytes"] == 0 and pi.wire.sent < 30_000
    verified = json.loads(pi.run("verify", str(bundle), "--on", pi.address, "--json").stdout)
    assert verified["passed"]
    (file,) = there.glob(f"bundles/*/{bundle.name}/onnx/model.onnx")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    damaged = pi.run("verify", str(bundle), "--on", pi.address, check=False)
    assert damaged.returncode == 2 and "onnx/model.onnx" in damaged.stderr
    answer = ("run", str(bundle), "abc", "--raw", "--max-new-tokens", "4")
    assert pi.run(*answer, "--on", pi.address).stdout == pi.run(*answer).stdout, "the same tokens as on x86-64"
    assert find_half_made(there) == []
    doctor = json.loads(pi.run("doctor", str(bundle), "--on", pi.address, "--json").stdout)
    assert "onnx" in doctor["engines"]
    pi.run("bench", "--on", pi.address, "--clean")
    assert not there.exists()
    print(f"\n{document['machine']['system']}: {', '.join(f'{name} {value:.0f} s' for name, value in times.items())}")
