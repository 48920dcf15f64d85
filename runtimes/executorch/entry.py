"""What runs a bundle on ExecuTorch, by kind of model. It imports the engine; `health` does without."""

from lime_edge.runtimes.executorch.decoder import ExecutorchEngine
from lime_edge.runtimes.executorch.encoder import ExecutorchEncoderEngine
from lime_edge.runtimes.executorch.vision import ExecutorchVisionEngine

ENGINES = {
    "decoder": ExecutorchEngine,
    "encoder": ExecutorchEncoderEngine,
    "vision-language": ExecutorchVisionEngine,
}
