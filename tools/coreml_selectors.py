"""Writes tests/vectors/coreml_selectors.json: Core ML's own names for what the Swift package calls, and who says so.

    python tools/coreml_selectors.py PYOBJC_METADATA NATIVESCRIPT_TYPES

PYOBJC_METADATA: CoreML/_metadata.py of a pyobjc-framework-CoreML wheel (tried: 12.2). NATIVESCRIPT_TYPES:
objc!CoreML.d.ts of npm's @nativescript/types-ios (tried: 9.1.2). Neither is needed to test or to use anything here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "tests" / "vectors" / "coreml_selectors.json"
# class, Swift's name -> the selector that Swift's importer makes it of
CALLS = {
    ("MLModelConfiguration", "computeUnits"): "computeUnits",
    ("MLModelConfiguration", "functionName"): "functionName",
    ("MLMultiArray", "init(shape:dataType:)"): "initWithShape:dataType:error:",
    ("MLMultiArray", "dataType"): "dataType",
    ("MLMultiArray", "shape"): "shape",
    ("MLMultiArray", "strides"): "strides",
    ("MLMultiArray", "withUnsafeBytes(_:)"): "getBytesWithHandler:",
    ("MLMultiArray", "withUnsafeMutableBytes(_:)"): "getMutableBytesWithHandler:",
    ("MLFeatureValue", "init(multiArray:)"): "featureValueWithMultiArray:",
    ("MLFeatureValue", "multiArrayValue"): "multiArrayValue",
    ("MLFeatureProvider", "featureNames"): "featureNames",
    ("MLFeatureProvider", "featureValue(for:)"): "featureValueForName:",
    ("MLDictionaryFeatureProvider", "init(dictionary:)"): "initWithDictionary:error:",
    ("MLModelDescription", "stateDescriptionsByName"): "stateDescriptionsByName",
    ("MLState", "withMultiArray(for:_:)"): "getMultiArrayForStateNamed:handler:",
    ("MLModel", "init(contentsOf:configuration:)"): "modelWithContentsOfURL:configuration:error:",
    ("MLModel", "compileModel(at:)"): "compileModelAtURL:completionHandler:",
    ("MLModel", "modelDescription"): "modelDescription",
    ("MLModel", "makeState()"): "newState",
    ("MLModel", "prediction(from:)"): "predictionFromFeatures:error:",
    ("MLModel", "prediction(from:using:)"): "predictionFromFeatures:usingState:error:",
}
ENUMS = {
    "MLComputeUnits": ("CPUOnly", "CPUAndGPU", "All", "CPUAndNeuralEngine"),
    "MLMultiArrayDataType": ("Float16", "Float32", "Int32", "Double"),
}


def main() -> None:
    """Look every name up in both; one of them must have it."""
    pyobjc, types = (Path(name).read_text(encoding="utf-8") for name in sys.argv[1:3])
    classes = split_classes(types)
    found = []
    for (owner, swift), selector in CALLS.items():
        method = spell(selector)
        sources = [
            name
            for name, has in (
                ("pyobjc", f'b"{selector}"' in pyobjc or f'"{selector.replace(":", "_")}"' in pyobjc),
                ("nativescript", has_member(classes[owner], method, selector)),
            )
            if has
        ]
        assert sources, f"nobody knows {owner} {selector}"
        found.append({"class": owner, "swift": swift, "selector": selector, "sources": sources})
    enums = {name: {case: read_case(pyobjc, types, name, case) for case in cases} for name, cases in ENUMS.items()}
    FILE.write_text(json.dumps({"calls": found, "enums": enums}, indent=1) + "\n", encoding="utf-8")


def split_classes(types: str) -> dict[str, str]:
    """The declarations by class or protocol."""
    parts = re.split(r"^(?:declare class|interface) (\w+)", types, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def spell(selector: str) -> str:
    """As NativeScript joins a selector's words."""
    first, *others = selector.rstrip(":").split(":")
    return first + "".join(word[0].upper() + word[1:] for word in others)


def has_member(text: str, method: str, selector: str) -> bool:
    """A method or a property; a constructor is told by its words."""
    if selector.startswith("initWith"):
        words = [re.sub("^initWith", "", word) for word in selector.rstrip(":").split(":") if word != "error"]
        words[0] = words[0][0].lower() + words[0][1:]
        return any(all(f"{word}:" in line for word in words) for line in re.findall(r"constructor\(.*", text))
    return re.search(rf"\b{re.escape(method)}[(:]", text) is not None


def read_case(pyobjc: str, types: str, name: str, case: str) -> int:
    """An enumeration's number, the same in both."""
    mine = int(re.search(rf"\${name}{case}@(\d+)\$", pyobjc)[1])  # type: ignore[index]
    body = types.split(f"const enum {name} {{", 1)[1].split("}", 1)[0]
    other = int(re.search(rf"\b{case} = (\d+)", body)[1])  # type: ignore[index]
    assert mine == other, (name, case, mine, other)
    return mine


if __name__ == "__main__":
    main()
