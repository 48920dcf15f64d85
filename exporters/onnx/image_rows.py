"""Features of pictures in the place of image tokens, inside the decoder's graph."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.exporters.onnx.graph import Graph

IMAGE_FEATURES = "image_features"  # the input: (rows, hidden), 0 rows where a call has no picture
PATH = "/image"


def replace_rows(model: CompiledModel, graph: Graph, embeds: str) -> str:
    """(B, S, hidden) with row k of `image_features` where the k-th image token of the call stands.

    An image token beyond the last row is embedded like any other token: a call without pictures has no rows.

    Source: transformers 5.23, LlavaOnevisionModel.forward (masked_scatter).
    """
    g, hidden = graph, model.decoder.hidden
    features = g.input(IMAGE_FEATURES, g.real, ["image_rows", hidden])
    numbers = {"zero": np.array(0), "one": np.array(1), "flat": np.array([-1]), "rows": np.array([-1, hidden])}
    names = {key: g.constant(f"{PATH}/{key}", value.astype(np.int64)) for key, value in numbers.items()}
    ids = g.node("Reshape", ["input_ids", names["flat"]], f"{PATH}/Ids")
    chosen = ""
    for index, token in enumerate(model.image_tokens):
        value = g.constant(f"{PATH}/token_{index}", np.array(token, np.int64))
        found = g.node("Equal", [ids, value], f"{PATH}/Equal_{index}")
        chosen = g.node("Or", [chosen, found], f"{PATH}/Or_{index}") if chosen else found
    number = g.node("Cast", [chosen], f"{PATH}/Cast", to=TensorProto.INT64)
    number = g.node("CumSum", [number, names["zero"]], f"{PATH}/Count")  # from 1 on
    rows = g.node("Squeeze", [g.node("Shape", [features], f"{PATH}/Shape", start=0, end=1)], f"{PATH}/Rows")
    held = g.node("LessOrEqual", [number, rows], f"{PATH}/Held")
    tokens = g.node("Size", [ids], f"{PATH}/Size")
    own = g.node("Range", [names["zero"], tokens, names["one"]], f"{PATH}/Range")
    last = g.node("Sub", [tokens, names["one"]], f"{PATH}/Last")
    feature = g.node("Add", [number, last], f"{PATH}/Feature")
    place = g.node("Where", [g.node("And", [chosen, held], f"{PATH}/And"), feature, own], f"{PATH}/Where")
    stacked = g.node("Reshape", [embeds, names["rows"]], f"{PATH}/Flat")
    stacked = g.node("Concat", [stacked, features], f"{PATH}/Concat", axis=0)
    picked = g.node("Gather", [stacked, place], f"{PATH}/Gather", axis=0)
    return g.node("Reshape", [picked, g.node("Shape", [embeds], f"{PATH}/Like")], f"{PATH}/Reshape")
