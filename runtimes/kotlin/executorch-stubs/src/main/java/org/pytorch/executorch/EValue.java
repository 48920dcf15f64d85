package org.pytorch.executorch;

/** See Module. */
public class EValue {
  private EValue() {}

  public static EValue from(Tensor value) {
    throw new UnsupportedOperationException("a stub");
  }

  public Tensor toTensor() {
    throw new UnsupportedOperationException("a stub");
  }
}
