"""Hours of what a device does in weeks, on a tiny bundle: `make soak` (--seconds 3600). Exit 1 where anything is wrong.

Two threads, each with a session of its own, switch experts, blend, install and forget skills and answer, and every
answer is compared with a fresh session's; meanwhile two processes put skills into the bundle and take them out, and
the bundle is opened and verified again and again. What is watched: answers, the files that are left, resident memory.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import lime_edge  # noqa: E402
from lime_edge.bundle.bundle import Bundle  # noqa: E402
from lime_edge.bundle.experts import Selection  # noqa: E402
from lime_edge.session.decoder import Session  # noqa: E402

PROMPTS = ([5, 6, 7], [8, 9, 10, 11], [12, 13])
GROWTH = 8_000_000  # bytes that resident memory may grow by after the first fifth
WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts, remove_expert
path, mine, count = Path(sys.argv[1]), sys.argv[2], 0
expert = Bundle.open(path).read_expert("expert1")
while not path.with_suffix(".stop").exists():
    add_experts(path, [replace(expert, name=f"{mine}-{count}")])
    if count > 3:
        remove_expert(path, f"{mine}-{count - 4}")
    count += 1
print(count)
"""


def make(folder: Path) -> Path:
    """A tiny float32 bundle of four experts."""
    from models import make_adapter, make_model

    from lime_edge.compiler.options import CompileOptions
    from lime_edge.export.pipeline import ExportOptions, export_bundle
    from lime_edge.targets.devices import find_device

    model = make_model(folder / "model", "llama")
    path = folder / "soak.lime"
    adapter = make_adapter(folder / "adapter", model)
    export_bundle(model, adapter, path, CompileOptions(quant="none"), find_device("cpu"), ExportOptions())
    return path


def answer(session: Session, prompt: list[int]) -> list[int]:
    """Six greedy tokens."""
    from lime_edge.session.generate import GenerationOptions

    return list(session.generate_ids(prompt, GenerationOptions(max_new_tokens=6, ignore_eos=True)))


def list_selections() -> list[Selection]:
    """What is switched between."""
    return ["expert0", "expert1", "expert2", "expert3", None, {"expert0": 0.5, "expert3": 0.5}]


def switch(path: Path, expected: dict[tuple[int, int], list[int]], seed: int, end: float, wrong: list[str]) -> None:
    """One thread: its own session, random selections, every answer compared."""
    session, draw, options = lime_edge.open_decoder(path, threads=1), random.Random(seed), list_selections()
    skill = next((path / "experts").glob("expert2*"))
    while time.monotonic() < end and not wrong:
        choice, prompt = draw.randrange(len(options)), draw.randrange(len(PROMPTS))
        session.use(options[choice])
        if answer(session, PROMPTS[prompt]) != expected[choice, prompt]:
            wrong.append(f"thread {seed}: {options[choice]} on prompt {prompt}")
        if draw.random() < 0.05:
            session.install(skill, "guest")
            session.use("guest")
            if answer(session, PROMPTS[0]) != expected[2, 0]:
                wrong.append(f"thread {seed}: an installed skill")
            session.use("expert0")
            session.remove("guest")


def read_resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(path: Path, seconds: float) -> list[str]:
    """Everything at once; what went wrong."""
    expected = {}
    for i, selection in enumerate(list_selections()):
        for j, prompt in enumerate(PROMPTS):
            fresh = lime_edge.open_decoder(path, threads=1)
            fresh.use(selection)
            expected[i, j] = answer(fresh, prompt)
    end, wrong, memory, opened = time.monotonic() + seconds, list[str](), list[int](), 0
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("one", "two")]
    threads = [threading.Thread(target=switch, args=(path, expected, seed, end, wrong)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        Bundle.open(path, verify=opened % 20 == 0)
        opened += 1
        memory.append(read_resident())
        time.sleep(min(1.0, seconds / 100))
    path.with_suffix(".stop").touch()
    changes = [int(writer.communicate()[0] or -1) for writer in writers]
    if -1 in changes or any(writer.returncode for writer in writers):
        wrong.append("a writer failed")
    left = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if strangers := left - set(Bundle.open(path, verify=True).manifest.files) - {"lime.json"}:
        wrong.append(f"left over: {sorted(strangers)[:5]}")
    settled = memory[len(memory) // 5 :]
    if max(settled) - settled[0] > GROWTH:
        wrong.append(f"memory grew by {max(settled) - settled[0]} bytes")
    print(f"{opened} openings, {sum(changes)} changes by two writers, {max(settled) - settled[0]} bytes grown")
    return wrong


def main() -> None:
    """Make a bundle, soak it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(make(Path(folder)), asked.seconds)
    print("\n".join(wrong) or "nothing went wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
