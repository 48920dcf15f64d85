"""What runs a bundle on Core ML, by kind of model. It imports the engine; `health` does without."""

from lime_edge.runtimes.coreml.decoder import CoremlEngine
from lime_edge.runtimes.coreml.encoder import CoremlEncoderEngine

ENGINES = {"decoder": CoremlEngine, "encoder": CoremlEncoderEngine}
