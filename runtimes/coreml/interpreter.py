"""Running a saved ML program in numpy: how its numbers are proven where there is no Core ML.

Exact mode computes in float32 with the tensors as they are stored. Native mode also rounds every float16 value to
float16, as an engine that keeps float16 between operations does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.runtimes.coreml.operations import OPERATIONS
from lime_edge.runtimes.coreml.program import Constant, Operation, Package, Type

STATE = ("read_state", "write_state")
Values = dict[str, Any]
State = dict[str, np.ndarray]
Observe = Callable[[Operation, dict[str, Any], list[Any]], None]


@dataclass
class Step:
    """One operation with its constant inputs already bound; `lists` are parameters that take several values."""

    operation: Operation
    bound: Values
    open: list[tuple[str, str]]
    lists: dict[str, list[str]]
    done: list[str]  # values that nothing reads afterwards

    def gather(self, values: Mapping[str, Any]) -> Values:
        """The operation's parameters by name."""
        inputs = self.bound | {key: values[name] for key, name in self.open}
        return inputs | {key: [values[name] for name in names] for key, names in self.lists.items()}


class Interpreter:
    """One function of a package, ready to run.

    Args:
        package: as read. name: of the function. exact: compute in float32; else round to float16 after every operation.
        shared: expanded weights of another function of the same package, so that they are held once.
    Raises:
        LimeEdgeError: no such function, or an operation that is not known.
    """

    def __init__(self, package: Package, name: str = "main", exact: bool = True, shared: Values | None = None):
        if name not in package.functions:
            raise LimeEdgeError(f"{package.path}: function {name!r}: expected one of {', '.join(package.functions)}")
        self.function, self.exact = package.functions[name], exact
        self.shared: Values = {} if shared is None else shared
        self.observe: Observe | None = None  # told every operation with its inputs and outputs
        known = {*OPERATIONS, *STATE, "const"}
        if strange := {o.kind for o in self.function.operations} - known:
            raise LimeEdgeError(f"{package.path}: the interpreter does not know {', '.join(sorted(strange))}")
        self._constants: Values = {}
        self._steps: list[Step] = []
        for operation in self.function.operations:
            self._plan(operation)
        self._find_last_uses()

    def _plan(self, operation: Operation) -> None:
        """Compute what is constant now, and keep the rest for every run."""
        if operation.value is not None:
            self._constants[operation.outputs[0][0]] = _hold(operation.value)
            return
        bound: Values = {}
        unbound, lists = [], {}
        for key, found in operation.inputs.items():
            fixed = [_hold(f) if isinstance(f, Constant) else self._constants.get(f) for f in found]
            several = len(found) > 1 or key == "values"
            if all(value is not None for value in fixed):
                bound[key] = fixed if several else fixed[0]
            elif several:
                lists[key] = [str(name) for name in found]  # by name, constants among them
            else:
                unbound.append((key, str(found[0])))
        step = Step(operation, bound, unbound, lists, [])
        if unbound or lists or operation.kind in STATE:
            self._steps.append(step)
        elif operation.kind.startswith("constexpr_"):
            self._constants[operation.outputs[0][0]] = self._expand(operation, bound)
        else:
            self._compute(step, self._constants)

    def _expand(self, operation: Operation, bound: Values) -> np.ndarray:
        """A quantized matrix as float32, once for all functions that hold the same bytes."""
        parts = {key: f[0].array for key, f in operation.inputs.items() if isinstance(f[0], Constant)}
        key = str([operation.kind, self.exact, *[(name, id(part)) for name, part in sorted(parts.items())]])
        if key not in self.shared:
            self.shared[key] = self._round(OPERATIONS[operation.kind](**bound), operation.outputs[0][1])
        return self.shared[key]

    def _find_last_uses(self) -> None:
        seen = {*self.function.outputs, *self.function.inputs, *self._constants}
        for step in reversed(self._steps):
            names = {name for _, name in step.open}.union(*step.lists.values())
            step.done = sorted(names - seen)
            seen |= names

    def run(self, inputs: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        """Run the function once.

        Args:
            inputs: by name, in the enumerated shapes; floats are rounded to the declared type.
            state: by name, changed in place; see `make_state`.
        Returns:
            Every output by name, float32 for both float types.
        Raises:
            LimeEdgeError: an input is missing, unknown, or of a shape that is not enumerated.
        """
        state = {} if state is None else state
        values = self._constants | self._check(inputs)
        for step in self._steps:
            if step.operation.kind == "read_state":
                values[step.operation.outputs[0][0]] = state[dict(step.open)["input"]]
            elif step.operation.kind == "write_state":
                state[dict(step.open)["input"]] = values[dict(step.open)["data"]]
            else:
                self._compute(step, values)
            for name in step.done:
                values.pop(name, None)
        return {name: values[name] for name in self.function.outputs}

    def make_state(self) -> State:
        """An empty state: zeros."""
        return {name: np.zeros([n or 0 for n in kind.shape], np.float32) for name, kind in self.function.states.items()}

    def _compute(self, step: Step, values: Values) -> None:
        operation, inputs = step.operation, step.gather(values)
        try:
            found = OPERATIONS[operation.kind](**inputs)
        except (ValueError, TypeError, IndexError) as error:
            name = operation.outputs[0][0]
            raise LimeEdgeError(f"interpreter: {operation.kind} {name}: {error}") from error
        outputs = found if isinstance(found, list) else [found]
        outputs = [self._round(value, kind) for value, (_, kind) in zip(outputs, operation.outputs, strict=False)]
        if self.observe is not None:
            self.observe(operation, inputs, outputs)
        for value, (name, _) in zip(outputs, operation.outputs, strict=True):
            values[name] = value

    def _round(self, value: np.ndarray, kind: Type) -> np.ndarray:
        if kind.name == "fp16" and not self.exact:
            with np.errstate(over="ignore"):
                return value.astype(np.float16).astype(np.float32)
        return value.astype(np.float32, copy=False) if kind.name in ("fp16", "fp32") else value

    def _check(self, inputs: Mapping[str, np.ndarray]) -> Values:
        function, found = self.function, {}
        wanted = {name: kind for name, kind in function.inputs.items() if not kind.state}
        with Faults(f"function {function.name}") as faults:
            for name in sorted(inputs.keys() ^ wanted.keys()):
                faults.add(f"input {name!r} is {'unknown' if name in inputs else 'missing'}")
            for name, kind in wanted.items():
                if name not in inputs:
                    continue
                array = np.asarray(inputs[name])
                allowed = function.shapes.get(name)
                fits = array.shape in allowed if allowed else _fits(array.shape, kind.shape)
                if not fits:
                    shown = " or ".join(map(str, sorted(allowed))) if allowed else str(kind.shape)
                    faults.add(f"input {name!r}", shown, array.shape)
                found[name] = (
                    array.astype(np.float16).astype(np.float32)
                    if kind.name == "fp16"
                    else array.astype({"int32": np.int32, "fp32": np.float32}.get(kind.name, array.dtype), copy=False)
                )
        return found


def _hold(value: Constant) -> Any:
    """A constant as the operations take it: float16 as float32, single truths and texts as Python's own."""
    array = value.array
    if value.type == "fp16":
        return array.astype(np.float32)
    if value.type == "bool" and array.ndim == 0:
        return bool(array)
    return array


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
