"""The bundle: written whole or not at all; refused when damaged, foreign or newer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lime_edge.bundle.bundle import MANIFEST, Bundle, Manifest, expert_file, write_bundle
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.sites import SiteTable
from lime_edge.bundle.staging import stage_directory, write_file
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

SITES = SiteTable.from_widths([("model.a", 3), ("model.b", 2)])


def make_expert(name: str, value: float = 1.0) -> Expert:
    return Expert(name, np.full(5, value, np.float16), "f" * 64, SITES.hash)


def make_bundle(path: Path, single: str | None = None) -> Path:
    manifest = Manifest(
        fingerprint="f" * 64,
        model={"name": "tiny", "vocab": 7},
        adapter={"single": single},
        quantization={"quant": "int4"},
        sites=SITES,
        experts=(),
        targets={"onnx": {"file": "onnx/model.onnx"}},
        files={},
    )
    with stage_directory(path) as stage:
        (stage / "onnx").mkdir()
        (stage / "onnx" / "model.onnx").write_bytes(b"graph")
        write_bundle(stage, manifest, [make_expert("one"), make_expert("two", 2)], np.arange(5, dtype=np.float32))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "x.lime"), verify=True)
    assert bundle.manifest.experts == ("one", "two")
    assert bundle.manifest.sites == SITES
    assert set(bundle.manifest.files) == {
        "onnx/model.onnx",
        "reference.safetensors",
        expert_file("one"),
        expert_file("two"),
    }
    bank = bundle.open_bank()
    assert bank.residual("two").tolist() == [2, 1, 0, -1, -2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.lime"]


def test_manifest_golden(tmp_path: Path) -> None:
    """The manifest's fields by name: renaming one breaks every device out there."""
    body = json.loads((make_bundle(tmp_path / "x.lime") / MANIFEST).read_text())
    assert list(body) == [
        "format",
        "schema",
        "fingerprint",
        "model",
        "adapter",
        "quantization",
        "device",
        "experts",
        "added",
        "targets",
        "versions",
        "sites",
        "files",
    ]
    assert body["format"] == "lime-edge-bundle" and body["schema"] == 1
    assert body["sites"][1] == {"name": "model.b", "width": 2, "offset": 3}
    sha256 = "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d"
    assert body["files"]["onnx/model.onnx"] == {"size": 5, "sha256": sha256}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(schema=2), "schema: expected at most 1, found 2"),
        (lambda b: b.update(format="other"), "not a lime-edge bundle"),
        (lambda b: b.pop("sites"), "damaged: KeyError"),
        (lambda b: b.update(files=3), "damaged"),
        (lambda b: b["files"].pop(expert_file("one")), "expert 'one' has no file entry"),
    ],
)
def test_bad_manifest_is_refused(tmp_path: Path, change: object, message: str) -> None:
    path = make_bundle(tmp_path / "x.lime")
    body = json.loads((path / MANIFEST).read_text())
    change(body)  # type: ignore[operator]
    (path / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(LimeEdgeError, match=message):
        Bundle.open(path)


def test_no_bundle_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError, match="no such bundle"):
        Bundle.open(tmp_path / "nothing.lime")
    with pytest.raises(LimeEdgeError, match="lime.json is missing"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format":')
    with pytest.raises(LimeEdgeError, match="not readable JSON"):
        Bundle.open(tmp_path)


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (path / "onnx" / "model.onnx").write_bytes(b"gra")
    (path / expert_file("two")).unlink()
    with pytest.raises(LimeEdgeError) as caught:
        Bundle.open(path)
    assert "onnx/model.onnx: size in bytes: expected 5, found 3" in str(caught.value)
    assert f"{expert_file('two')} is missing" in str(caught.value)


def test_a_flipped_byte_is_found_by_verify_only(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (path / "onnx" / "model.onnx").write_bytes(b"grapX")
    Bundle.open(path)
    with pytest.raises(LimeEdgeError, match="onnx/model.onnx: sha256"):
        Bundle.open(path, verify=True)


def test_experts_come_and_go(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    Bundle.open(path).add_expert(make_expert("three", 3))
    with pytest.raises(LimeEdgeError, match="'three' exists already"):
        Bundle.open(path).add_expert(make_expert("three", 4))
    Bundle.open(path).add_expert(make_expert("three", 4), replace_existing=True)
    opened = Bundle.open(path, verify=True)
    assert opened.manifest.experts == ("one", "two", "three")
    assert opened.open_bank().vector("three").tolist() == [4] * 5
    opened.remove_expert("one")
    opened = Bundle.open(path, verify=True)
    assert opened.manifest.experts == ("two", "three")
    assert not (path / expert_file("one")).exists()
    with pytest.raises(LimeEdgeError, match="unknown expert 'one'"):
        opened.remove_expert("one")


def test_a_foreign_expert_leaves_the_bundle_untouched(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(LimeEdgeError, match="backbone fingerprint"):
        Bundle.open(path).add_expert(Expert("new", np.ones(5, np.float16), "0" * 64, SITES.hash))
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_single_bundle_takes_no_experts(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime", single="one")
    with pytest.raises(LimeEdgeError, match="--single one"):
        Bundle.open(path).add_expert(make_expert("three"))


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stage_directory(tmp_path / "x.lime") as stage:
        (stage / "half").write_bytes(b"x" * 1000)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    with pytest.raises(LimeEdgeError, match="already exists"), stage_directory(path):
        pass
    with pytest.raises(RuntimeError), stage_directory(path, replace=True):
        raise RuntimeError
    assert Bundle.open(path, verify=True).manifest.experts == ("one", "two")
    with stage_directory(path, replace=True) as stage:
        (stage / "new").write_text("x")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.lime"]


def test_storage_faults_have_their_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LimeEdgeError, match="cannot write") as caught, stage_directory(tmp_path / "file" / "x"):
        pass
    assert caught.value.exit_code == EXIT_STORAGE
    with pytest.raises(LimeEdgeError, match="cannot write") as caught:
        write_file(tmp_path / "missing" / "x", b"")
    assert caught.value.exit_code == EXIT_STORAGE
