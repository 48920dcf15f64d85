"""What stands for the Android app where there is no JVM: the benchmark in Python, under the activity's contract.

It is given the app's folder and the extras (JSON) and does what BenchmarkRequest does: the bundle is
files/bundles/NAME.lime, the document files/OUTPUT, put there by one rename; the log ends with "done" or "failed".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lime_edge.bench.measure import FIRST, BenchOptions, bench_bundle
from lime_edge.errors import LimeEdgeError


def main() -> None:
    files, extras = Path(sys.argv[1]) / "files", json.loads(sys.argv[2])
    try:
        number = {key: int(extras[key]) for key in ("prompt_tokens", "gen_tokens", "repeat")}
        options = BenchOptions(number["prompt_tokens"], number["gen_tokens"], number["repeat"])
        bundle = files / "bundles" / f"{extras['bundle']}.lime"
        print("round 0 of 3", flush=True)
        document = bench_bundle(bundle, None, extras.get("expert", FIRST), None, options)
    except LimeEdgeError as error:
        sys.exit(f"failed: {error}")
    for key in ("state", "throttled", "device"):  # what the Kotlin library's document does not have
        document.pop(key, None)
    document["machine"]["board"] = "simulated app"
    partial = files / f".{extras['output']}.partial"
    partial.write_text(json.dumps(document))
    partial.rename(files / extras["output"])
    print("done", flush=True)


if __name__ == "__main__":
    main()
