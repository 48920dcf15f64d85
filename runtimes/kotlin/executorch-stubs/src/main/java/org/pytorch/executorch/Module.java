package org.pytorch.executorch;

/** Signatures of org.pytorch:executorch-android, from its documentation; nothing here runs, nothing here is shipped. */
public class Module {
  public static final int LOAD_MODE_MMAP = 1;

  private Module() {}

  public static Module load(String modelPath, int loadMode, int numThreads) {
    throw new UnsupportedOperationException("a stub");
  }

  public EValue[] execute(String methodName, EValue... inputs) {
    throw new UnsupportedOperationException("a stub");
  }

  public void loadMethod(String methodName) {
    throw new UnsupportedOperationException("a stub");
  }

  public void destroy() {
    throw new UnsupportedOperationException("a stub");
  }
}
