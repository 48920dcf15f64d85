#!/usr/bin/env bash
# Compile the Kotlin library and run its suite on the JVM, against answers that this checkout's Python writes first.
#
#   runtimes/kotlin/check.sh PYTHON                     the suite (make test-kotlin)
#   runtimes/kotlin/check.sh PYTHON demo BUNDLE         the real demo bundle, from a project of its own (make demo-kotlin)
#
# Needs a JDK of 17 or newer, Maven, and a C compiler (Linux: the bridge to Python's build of ONNX Runtime).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$1"
case "$python" in /*) ;; *) python="$root/$python" ;; esac
build="$root/build/kotlin"
mkdir -p "$build"
command -v mvn >/dev/null || { echo "Maven is missing: apt-get install maven openjdk-17-jdk-headless" >&2; exit 4; }
maven() { (cd "$here" && mvn -B -ntp -e "$@"); }

# Python's own libonnxruntime, under the version of symbols that the Java natives ask for.
library="$("$python" -c 'import glob, os, onnxruntime as o; print(glob.glob(os.path.dirname(o.__file__) + "/capi/libonnxruntime.so.*")[0])')"
operators="$("$python" -c 'from lime_edge.runtimes.onnx.operators import find_library as f; print(f() or "")')"
cc -shared -fPIC "-DREAL=\"$library\"" -Wl,-soname,libonnxruntime.so.1 "-Wl,--version-script=$here/onnx/src/test/native/bridge.map" \
    "$here/onnx/src/test/native/bridge.c" -ldl -o "$build/libonnxruntime.so"
same=("-Donnxruntime.native.onnxruntime.path=$build/libonnxruntime.so" "-Dlimeedge.operators=$operators")

if [ "${2:-}" = demo ]; then
    bundle="$(cd "$3" && pwd)"
    "$python" "$root/tools/write_phone_vectors.py" "$build/demo" --demo "$bundle"
    maven -q "${same[@]}" "-Dlimeedge.vectors=$build/demo" "-Dlimeedge.demo=$bundle" test -pl core,onnx -Dtest=DemoTest \
        -Dsurefire.failIfNoSpecifiedTests=false
    maven -q deploy -DskipTests "-DaltDeploymentRepository=limeedge::file://$build/repository"
    fresh="$(mktemp -d)"
    trap 'rm -rf "$fresh"' EXIT
    cp -r "$here/example/." "$fresh"
    for expert in plural past question; do
        printf '%s: ' "$expert"
        (cd "$fresh" && mvn -q -B compile exec:java "-Dlimeedge.repository=$build/repository" "-Dexec.args='$bundle' $expert patent")
        echo
    done
    exit
fi

rm -rf "$build/vectors"
"$python" "$root/tools/write_phone_vectors.py" "$build/vectors"
echo "== with Python's library of ONNX Runtime: the same numbers"
maven "${same[@]}" "-Dlimeedge.vectors=$build/vectors" verify
echo "== with the natives that Maven Central serves: the same decisions"
maven "-Dlimeedge.vectors=$build/vectors" test -pl core,onnx '-Dtest=*VectorsTest' -Dsurefire.failIfNoSpecifiedTests=false
