#!/usr/bin/env bash
# Compile the Swift package and run its suite on Linux, against answers that this checkout's Python writes first.
#
#   runtimes/swift/check.sh PYTHON [vectors FOLDER]    the suite (make test-swift, part of make check); FOLDER below this
#                                                      checkout: what tools/write_phone_vectors.py wrote already
#   runtimes/swift/check.sh PYTHON demo BUNDLE         the real demo bundle: answers, speed beside Python (make demo-swift)
#
# Swift 6.0 from Debian trixie, in a chroot that chroot.sh makes (root; its folder: LIME_EDGE_SWIFT_CHROOT). Everything but making it
# runs without network.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$1"
case "$python" in /*) ;; *) python="$root/$python" ;; esac
build="$root/build/swift"
mkdir -p "$build/lib"
"$here/chroot.sh" make
cd "$root"
vectors="$build/vectors"

# swift ARGUMENTS: in the chroot, warnings as errors, the whole output in swift.log and what tells something on the screen.
options=(-c release --scratch-path "$build/build" -Xswiftc -enable-testing -Xswiftc -warnings-as-errors -Xcc -Werror)
swift() {
    local command="$1"
    shift
    "$here/chroot.sh" run env "LIME_EDGE_VECTORS=$vectors" "LIME_EDGE_ONNXRUNTIME=$build/lib/libonnxruntime.so.1" OMP_NUM_THREADS=1 \
        "LIME_EDGE_DEMO=${demo:-}" swift "$command" "${options[@]}" "$@" >"$build/swift.log" 2>&1 || {
        grep -E 'error:|✘|recorded an issue|Fatal|exited' "$build/swift.log" | cut -c1-400 | head -60
        echo "all of it: $build/swift.log" >&2
        return 1
    }
}

cp "$("$python" -c 'import glob, os, onnxruntime as o; print(glob.glob(os.path.dirname(o.__file__) + "/capi/libonnxruntime.so.*")[0])')" \
    "$build/lib/libonnxruntime.so.1"

if [ "${2:-}" = demo ]; then
    demo="$build/demo.lime" # inside the checkout, where the chroot sees it
    rm -rf "$demo"
    cp -r "$(cd "$3" && pwd)" "$demo"
    "$python" tools/write_phone_vectors.py "$vectors" --demo "$demo"
    swift build --build-tests
    swift test --skip-build --filter answers
    grep -E '^demo:' "$build/swift.log"
    "$python" tools/phone_vectors/in_turn.py "$demo" -- "$here/chroot.sh" run env "LIME_EDGE_DEMO=$demo" OMP_NUM_THREADS=1 \
        "LIME_EDGE_ONNXRUNTIME=$build/lib/libonnxruntime.so.1" "$build/build/release/lime-edgePackageTests.xctest" --testing-library swift-testing --filter speed
    exit
fi

if [ "${2:-}" = vectors ]; then
    vectors="$(cd "$3" && pwd)"
else
    rm -rf "$vectors"
    "$python" tools/write_phone_vectors.py "$vectors" 2>"$build/vectors.log" || { cat "$build/vectors.log" >&2; exit 1; }
fi
"$python" tools/write_phone_vectors.py "$vectors" --only coreml 2>"$build/vectors.log" || { cat "$build/vectors.log" >&2; exit 1; }
echo "== the package, by $("$here/chroot.sh" run swift --version 2>/dev/null | head -n 1)"
swift build --build-tests
"$here/chroot.sh" run swift package --scratch-path "$build/build" dump-package >"$build/package.json"
"$python" - "$build/package.json" <<'EOF'
import json, sys
package = json.load(open(sys.argv[1]))
found = {entry["platformName"]: entry["version"] for entry in package["platforms"]}
assert found == {"ios": "18.0", "macos": "15.0"}, found
assert not package["dependencies"], "the root fetches nothing"
assert not any(target["settings"] for target in package["targets"]), "no flags of one system"
EOF
echo "== positions in ONNX Runtime's function table, by its own header"
"$here/chroot.sh" run /usr/libexec/swift/bin/clang -fsyntax-only -Werror -I/usr/include/onnxruntime "$here/Tests/positions.c"
echo "== what calls Core ML, by declarations of it (Tests/Stubs)"
stubs="$build/stubs"
mkdir -p "$stubs"
compile() { "$here/chroot.sh" run swiftc -swift-version 6 -warnings-as-errors -package-name lime -I "$stubs" "$@"; }
compile -emit-module -parse-as-library -module-name CoreML -emit-module-path "$stubs/CoreML.swiftmodule" "$here/Tests/Stubs/CoreML.swift"
compile -emit-module -parse-as-library -module-name LimeEdge -emit-module-path "$stubs/LimeEdge.swiftmodule" "$here"/Sources/LimeEdge/*.swift
compile -typecheck -parse-as-library -module-name LimeEdgeCoreML "$here"/Sources/LimeEdgeCoreML/*.swift
for module in ExecuTorch Tokenizers; do
    compile -emit-module -parse-as-library -module-name $module -emit-module-path "$stubs/$module.swiftmodule" "$here/Tests/Stubs/$module.swift"
done
for module in LimeEdgeExecuTorch LimeEdgeTransformers; do
    compile -typecheck -parse-as-library -module-name $module "$here/More/Sources/$module"/*.swift
done
echo "== the app: its models by the compiler, its screens' syntax alone"
app="$root/examples/ios/LimeChat"
compile -typecheck -parse-as-library -module-name LimeChat "$app/Sources/ChatModel.swift" "$app/Sources/BundleStore.swift"
"$here/chroot.sh" run swiftc -frontend -parse "$app"/Sources/*.swift "$app"/Tests/*.swift
echo "== the suite, without network"
swift test --skip-build
grep -E 'Test run with' "$build/swift.log"
"$python" -m lime_edge bench --compare "$vectors/swift-bench.json" "$vectors/swift-bench.json" >/dev/null # the document is what bench reads
