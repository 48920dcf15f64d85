"""What runs a bundle on Core AI, by kind of model. It imports the engine; `health` does without."""

from lime_edge.runtimes.coreai.decoder import CoreaiEngine
from lime_edge.runtimes.coreai.encoder import CoreaiEncoderEngine

ENGINES = {"decoder": CoreaiEngine, "encoder": CoreaiEncoderEngine}
