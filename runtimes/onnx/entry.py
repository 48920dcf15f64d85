"""What runs a bundle on ONNX Runtime, by kind of model. It imports the engine; `health` does without."""

from lime_edge.runtimes.onnx.decoder import OnnxEngine
from lime_edge.runtimes.onnx.encoder import OnnxEncoderEngine
from lime_edge.runtimes.onnx.vision import OnnxVisionEngine

ENGINES = {"decoder": OnnxEngine, "encoder": OnnxEncoderEngine, "vision-language": OnnxVisionEngine}
