package limeedge.onnx

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.Closeable
import java.nio.FloatBuffer
import java.util.IdentityHashMap

/**
 * The graph's input `expert` over each buffer that held a residual: a tensor made once per buffer, so that a switch calls
 * nothing native.
 *
 * The bank writes residuals into a few buffers over and over; a tensor is its buffer's memory and stays right. Buffers are told
 * apart by identity: their own equality compares contents.
 */
internal class ExpertTensors(private val environment: OrtEnvironment, graph: OrtSession) : Closeable {
    private val rank = (graph.inputInfo[EXPERT]?.info as? TensorInfo)?.shape?.size ?: 0
    private val made = IdentityHashMap<FloatBuffer, OnnxTensor>()

    /** The tensor of a residual, (1, sum_H) or (sum_H,) float32 as the graph has it. */
    fun of(residual: FloatBuffer): OnnxTensor = made.getOrPut(residual) {
        val length = residual.remaining().toLong()
        OnnxTensor.createTensor(environment, residual, if (rank == 2) longArrayOf(1, length) else longArrayOf(length))
    }

    override fun close() {
        made.values.forEach { it.close() }
        made.clear()
    }

    internal companion object {
        /** The input's name. */
        const val EXPERT = "expert"
    }
}
