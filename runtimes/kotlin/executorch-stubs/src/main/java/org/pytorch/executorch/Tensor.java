package org.pytorch.executorch;

import java.nio.FloatBuffer;

/** See Module. */
public abstract class Tensor {
  public static Tensor fromBlob(long[] data, long[] shape) {
    throw new UnsupportedOperationException("a stub");
  }

  public static Tensor fromBlob(float[] data, long[] shape) {
    throw new UnsupportedOperationException("a stub");
  }

  public static Tensor fromBlob(FloatBuffer data, long[] shape) {
    throw new UnsupportedOperationException("a stub");
  }

  public float[] getDataAsFloatArray() {
    throw new UnsupportedOperationException("a stub");
  }

  public long[] shape() {
    throw new UnsupportedOperationException("a stub");
  }
}
