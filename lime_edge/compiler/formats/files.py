"""Reading from disk what strangers wrote: JSON objects, and state dicts in any of their forms.

Libraries raise anything on a damaged file, so everything they do stands in `reading`; what they would believe (sizes
that no file backs, links out of the folder) is looked at before they see it.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import load_file

from lime_edge.bundle.inside import is_plain
from lime_edge.errors import LimeEdgeError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = "pytorch_model.bin"
WEIGHTS = (INDEX, SINGLE, f"{PICKLED}.index.json", PICKLED)  # the first that is there is read
LARGEST_JSON = 64 << 20  # bytes; indices and vocabularies of the largest models have a tenth of it
READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
AGAIN = "copy it again: it may be truncated"


@contextmanager
def reading(what: str, hint: str = AGAIN) -> Iterator[None]:
    """Whatever goes wrong while a file is read is one clear error: `what` ("FILE: not a readable X") and the cause."""
    try:
        yield
    except (LimeEdgeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # libraries raise anything; a panic of Rust is no Exception
        said = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
        raise LimeEdgeError(f"{what}: {said[:300]}", hint) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    with reading(f"{file}: not a readable JSON file", "copy it again, or mend it by hand"):
        if not is_plain(file):
            raise LimeEdgeError(f"{file}: no such file", "is it in the right folder?")
        if file.stat().st_size > LARGEST_JSON:
            raise LimeEdgeError(f"{file}: larger than {LARGEST_JSON >> 20} MB", "is it the right file?")
        read = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise LimeEdgeError(
            f"{file}: expected a JSON object, found {type(read).__name__}", 'write it as {"name": value, ...}'
        )
    return read


def read_safetensors(file: Path, more: tuple[torch.dtype, ...] = ()) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, mapped.

    Args:
        more: types that are taken beside the plain ones.

    Raises:
        LimeEdgeError: not readable, or a tensor of a type that nothing here computes with (float8, complex, ...).
    """
    with reading(f"{file}: not a readable safetensors file"):
        if not is_plain(file):
            raise LimeEdgeError(f"{file}: no such file", AGAIN)
        tensors = load_file(file)
    check_types(tensors, str(file), more)
    return tensors


def check_types(tensors: Mapping[str, torch.Tensor], where: str, more: tuple[torch.dtype, ...] = ()) -> None:
    """Refuse tensors that are no plain arrays of numbers: float8, complex, sparse, quantized, larger than their data.

    Raises:
        LimeEdgeError: the first of them.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.dtype not in READABLE + WHOLE + more:
            found = str(tensor.dtype).removeprefix("torch.") if plain else f"{tensor.layout} on {tensor.device}"
            raise LimeEdgeError(
                f"{where}: {name}: expected float32, float16 or bfloat16, found {found}", "store it in one of those"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise LimeEdgeError(f"{where}: {name}: {tuple(tensor.shape)} is more than the file holds", AGAIN)


def list_shards(index: Path) -> list[Path]:
    """The files that a weight index names, all of them beside it.

    Raises:
        LimeEdgeError: no index, a shard that is missing, or one outside the folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise LimeEdgeError(
            f"{index}: not a readable weight index: no weight_map of file names", "copy the model again"
        )
    shards = sorted(set(names.values()))
    if outside := [name for name in shards if PurePath(name).name != name or "\\" in name or "\0" in name]:
        raise LimeEdgeError(f"{index}: {outside[0]!r} is no file beside it", "copy the model again")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise LimeEdgeError(f"{index.parent}: shards are missing: {', '.join(missing)}", "copy every shard")
    return [index.parent / name for name in shards]


def read_shards(files: Iterable[Path], more: tuple[torch.dtype, ...] = ()) -> dict[str, torch.Tensor]:
    """The tensors of several files together."""
    return {name: tensor for file in files for name, tensor in read_weights(file, more).items()}


def read_weights(source: Path, more: tuple[torch.dtype, ...] = ()) -> dict[str, torch.Tensor]:
    """Read a state dict: one safetensors file, its shards, or a PyTorch file read without running code.

    Args:
        more: types that are taken beside the plain ones.
    """
    file = source
    if source.is_dir():
        found = [source / name for name in WEIGHTS if (source / name).is_file()]
        if not found:
            raise LimeEdgeError(f"{source}: holds none of {', '.join(WEIGHTS)}", "name the weight file itself")
        file = found[0]
    if file.suffix == ".json":
        return read_shards(list_shards(file), more)
    return read_safetensors(file, more) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """A PyTorch file. torch reads no object but tensors (weights_only); its archive is one that packs nothing."""
    with reading(f"{file}: not a readable state dict", "copy it again; it must hold tensors only"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise LimeEdgeError(f"{file}: its archive is compressed: torch.save writes none", AGAIN)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError):  # torch would advise to load it without looking
            raise LimeEdgeError(
                f"{file}: not a readable state dict: it holds more than tensors, or is none", AGAIN
            ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise LimeEdgeError(
            f"{file}: expected a state dict (name -> tensor), found something else",
            "save model.state_dict(), not the model",
        )
    check_types(state, str(file))
    return dict(state)
