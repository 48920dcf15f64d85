"""What ONNX Runtime says about itself here."""

from __future__ import annotations

import os

from lime_edge.runtimes.onnx.operators import explain_absence
from lime_edge.session.health import Health, find_version, import_or_explain, is_there

INSTALL = "pip install 'lime-edge[onnx]'"
BUILD = "install a C compiler (apt install gcc libc6-dev), then pip install --force-reinstall --no-deps lime-edge"
explain_operators = explain_absence  # of what the engine would run if it were here


def examine() -> Health:
    """Import ONNX Runtime and ask it for its execution providers."""
    version = find_version("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
    if not is_there("onnxruntime"):
        return Health("onnxruntime", None, "the package 'onnxruntime' is not installed", INSTALL)
    module, problem = import_or_explain("onnxruntime")
    if module is None:
        return Health("onnxruntime", version, f"it is installed and cannot be imported: {problem}", INSTALL)
    if not hasattr(module, "get_available_providers"):  # the folder of an uninstalled package: an empty namespace
        return Health("onnxruntime", version, "a folder of that name is there, and no package in it", INSTALL)
    facts, remarks = [("providers", ", ".join(module.get_available_providers()))], []
    if absence := explain_absence():
        remarks.append((f"compiled operators: {absence}; decoding is slower, answers are the same", BUILD))
    elif os.environ.get("LIME_EDGE_OPERATORS", "").lower() in ("0", "false", "off", "no"):
        remarks.append(("compiled operators: switched off by LIME_EDGE_OPERATORS", "unset LIME_EDGE_OPERATORS"))
    else:
        facts.append(("compiled operators", "yes"))
    return Health("onnxruntime", module.__version__, facts=tuple(facts), remarks=tuple(remarks))
