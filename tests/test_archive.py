"""A bundle as one file: whole, the same bytes every time, and nothing half-written."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lime_edge.bundle.archive import pack_bundle
from lime_edge.cli.app import app
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]


def test_an_archive_holds_the_bundle_and_nothing_else(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle, file = tiny_bundle(), tmp_path / "b.tar"
    assert pack_bundle(bundle, file) == file.stat().st_size
    with tarfile.open(file) as archive:
        names = archive.getnames()
        assert names[0] == "lime.json" and len(set(names)) == len(names)
        archive.extractall(tmp_path / "out", filter="data")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (bundle / name).read_bytes(), name
    assert {str(f.relative_to(bundle)) for f in bundle.rglob("*") if f.is_file()} == set(names)
    pack_bundle(bundle, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()


def test_a_damaged_bundle_is_not_packed(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path / "b.lime"))
    (expert, *_) = (bundle / "experts").iterdir()
    data = bytearray(expert.read_bytes())
    data[-1] ^= 1
    expert.write_bytes(data)
    with pytest.raises(LimeEdgeError, match="not what lime.json says"):
        pack_bundle(bundle, tmp_path / "b.tar")
    assert [file.name for file in tmp_path.iterdir()] == ["b.lime"]


def test_the_command(tiny_bundle: Make, tmp_path: Path) -> None:
    file = tmp_path / "b.tar"
    found = CliRunner().invoke(app, ["pack", str(tiny_bundle()), str(file)])
    assert found.exit_code == 0 and "MB" in found.output
    with pytest.raises(LimeEdgeError, match="already exists"):
        CliRunner().invoke(app, ["pack", str(tiny_bundle()), str(file)], catch_exceptions=False)
    found = CliRunner().invoke(app, ["pack", str(tiny_bundle()), str(file), "--force", "--json"])
    assert found.exit_code == 0 and str(file.stat().st_size) in found.output
