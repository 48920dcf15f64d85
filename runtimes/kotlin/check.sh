#!/usr/bin/env bash
# Compile the Kotlin library and run its suite on the JVM, against answers that this checkout's Python writes first.
#
#   runtimes/kotlin/check.sh PYTHON                     the suite (make test-kotlin, part of make check)
#   runtimes/kotlin/check.sh PYTHON demo BUNDLE         the real demo bundle: answers, speed beside Python (make demo-kotlin)
#
# Needs a JDK of 17 or newer, Maven and a C compiler (Linux: the bridge to Python's build of ONNX Runtime); what Maven
# downloads stays in build/kotlin/m2.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$1"
case "$python" in /*) ;; *) python="$root/$python" ;; esac
build="$root/build/kotlin"
mkdir -p "$build"

if ! command -v mvn >/dev/null || ! command -v javac >/dev/null; then
    echo "a JDK or Maven is missing: apt-get install maven openjdk-17-jdk-headless" >&2
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 4
    apt-get update -qq && apt-get install -qq -y --no-install-recommends maven openjdk-17-jdk-headless >"$build/apt.log"
fi

# maven PLACE ARGUMENTS: in that folder; the whole output in maven.log, and what tells something on the screen.
maven() {
    local place="$1"
    shift
    (cd "$place" && mvn -B -ntp -Dstyle.color=never "-Dmaven.repo.local=$build/m2" "$@") >"$build/maven.log" 2>&1 || {
        grep -E 'ERROR|FAIL|WARN.*kt' "$build/maven.log" | head -60
        echo "all of it: $build/maven.log" >&2
        return 1
    }
    grep -E '^\[INFO\] (Building|Running)|^\[(INFO|WARNING)\] Tests run|^[^[]' "$build/maven.log" | grep -v '^$' || true
}

# fresh_project BUNDLE EXPERT TEXT: a project outside the repository that takes the built jars from a Maven repository.
fresh_project() {
    local fresh
    fresh="$(mktemp -d)"
    cp -r "$here/example/." "$fresh"
    printf '== a new project, %s lines, %s: ' "$(wc -l <"$fresh/src/main/kotlin/Main.kt")" "$2"
    maven "$fresh" -q compile exec:java "-Dlimeedge.repository=$build/repository" "-Dexec.args='$1' '$2' '$3'"
    rm -rf "$fresh"
}

# Python's own libonnxruntime, under the version of symbols that the Java natives ask for.
library="$("$python" -c 'import glob, os, onnxruntime as o; print(glob.glob(os.path.dirname(o.__file__) + "/capi/libonnxruntime.so.*")[0])')"
operators="$("$python" -c 'from lime_edge.runtimes.onnx.operators import find_library as f; print(f() or "")')"
cc -shared -fPIC "-DREAL=\"$library\"" -Wl,-soname,libonnxruntime.so.1 "-Wl,--version-script=$here/onnx/src/test/native/bridge.map" \
    "$here/onnx/src/test/native/bridge.c" -ldl -o "$build/libonnxruntime.so"
publish=(deploy "-DaltDeploymentRepository=limeedge::file://$build/repository") # after the tests, where there are some
same=("-Dpython.onnxruntime=$build/libonnxruntime.so" "-Dpython.operators=$operators")

if [ "${2:-}" = demo ]; then
    bundle="$(cd "$3" && pwd)"
    "$python" "$root/tools/write_phone_vectors.py" "$build/demo" --demo "$bundle"
    maven "$here" "${same[@]}" "-Dlimeedge.vectors=$build/demo" "-Dlimeedge.demo=$bundle" "-Dlimeedge.python=$python" \
        test -pl core,onnx "-Dtest=DemoTest,SpeedTest" \
        -Dsurefire.failIfNoSpecifiedTests=false -Down.natives.tests=none
    maven "$here" "${publish[@]}" -Dmaven.test.skip=true >/dev/null
    for expert in plural past question; do
        fresh_project "$bundle" "$expert" patent
    done
    exit
fi

rm -rf "$build/vectors" "$build/repository"
"$python" "$root/tools/write_phone_vectors.py" "$build/vectors" 2>"$build/vectors.log" || { cat "$build/vectors.log" >&2; exit 1; }
maven "$here" "${same[@]}" "-Dlimeedge.vectors=$build/vectors" "${publish[@]}"
fresh_project "$build/vectors/bundles/lora-int4.lime" expert1 "How late is it?"
