package limeedge.onnx

import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtProvider
import ai.onnxruntime.OrtSession
import limeedge.DecoderEngine
import limeedge.EncoderEngine
import limeedge.EngineFactory
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.SessionOptions
import limeedge.TargetFacts
import java.io.Closeable
import java.io.File

/**
 * ONNX Runtime's Java API: `com.microsoft.onnxruntime:onnxruntime` on the JVM, `onnxruntime-android` on phones.
 *
 * @property operators our operators for the graph's functions (`runtimes/onnx/operators`, built for this machine): a file, or on
 *   Android the name of a library that the app packs. Null: the graph runs the functions' own nodes, slower and with the same
 *   answers up to rounding.
 */
public class OnnxEngines(private val operators: String? = null) : EngineFactory {
    /** As a file. */
    public constructor(operators: File) : this(operators.path)

    override val target: String get() = "onnx"

    override fun openDecoder(bundle: LimeBundle, options: SessionOptions): DecoderEngine =
        OnnxDecoder(bundle, options, Loader(bundle, options))

    override fun openEncoder(bundle: LimeBundle, options: SessionOptions): EncoderEngine =
        OnnxEncoder(bundle, Loader(bundle, options))

    /** Loads the graphs of one bundle, all with the same threads, providers and operators. */
    internal inner class Loader(private val bundle: LimeBundle, private val options: SessionOptions) : Closeable {
        val environment: OrtEnvironment = findEnvironment()
        val facts: TargetFacts = bundle.manifest.targets.first { it.name == target }
        val providers: List<OrtProvider> = chooseProviders()
        private val settings = ArrayList<OrtSession.SessionOptions>() // closing one unloads its operators: after the sessions, never before

        /**
         * The operators are the processor's: beside an accelerator, which runs the nodes itself, they would only make it wait. False
         * too where this ONNX Runtime refused a graph with them.
         */
        var usesOperators: Boolean = operators != null && providers == listOf(OrtProvider.CPU) && facts.functions.any { !it.startsWith("Large") }
            private set

        /** Load a graph of the bundle. @throws LimeError.Engine ONNX Runtime refuses it. */
        fun load(path: String): OrtSession {
            val file = bundle.file(path).path
            val own = makeSettings()
            try {
                if (usesOperators) own.registerCustomOpLibrary(operators!!)
            } catch (error: OrtException) {
                throw refusal(operators!!, error)
            }
            try {
                return environment.createSession(file, own)
            } catch (error: OrtException) {
                if (!usesOperators) throw refusal(file, error)
            }
            usesOperators = false // 1.29 does, where a model's heads are together wider than its hidden states
            try {
                return environment.createSession(file, makeSettings())
            } catch (error: OrtException) {
                throw refusal(file, error)
            }
        }

        private fun makeSettings(): OrtSession.SessionOptions {
            val own = OrtSession.SessionOptions().also { settings += it }
            own.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
            (options.threads ?: facts.threads)?.let { own.setIntraOpNumThreads(it) }
            if (OrtProvider.XNNPACK in providers) own.addXnnpack(emptyMap())
            return own
        }

        private fun refusal(what: String, error: OrtException) = LimeError.Engine(
            what, "ONNX Runtime cannot load it: ${error.message?.lines()?.first()?.take(500)}", "export the bundle again, or try a newer ONNX Runtime", error,
        )

        /** Call when every graph is closed. */
        override fun close() {
            settings.forEach { it.close() }
            settings.clear()
        }

        private fun chooseProviders(): List<OrtProvider> {
            val here = OrtEnvironment.getAvailableProviders()
            val known = mapOf("CPUExecutionProvider" to OrtProvider.CPU, "XnnpackExecutionProvider" to OrtProvider.XNNPACK)
            val chosen = facts.providers.mapNotNull { known[it] }.filter { it in here }
            if (chosen.isNotEmpty()) return chosen
            throw LimeError.Missing(bundle.folder.path, "none of ${facts.providers.joinToString(", ")} is available", "this ONNX Runtime has ${here.joinToString(", ")}")
        }
    }

    private companion object {
        private fun findEnvironment(): OrtEnvironment = try {
            OrtEnvironment.getEnvironment()
        } catch (error: LinkageError) {
            throw LimeError.Missing("ONNX Runtime", "${error.message}", "add com.microsoft.onnxruntime:onnxruntime, on Android onnxruntime-android")
        }
    }
}
