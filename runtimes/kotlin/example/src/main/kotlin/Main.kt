import kotlinx.coroutines.runBlocking
import limeedge.ChatFormat
import limeedge.LimeBundle
import limeedge.LimeSession
import limeedge.Turn
import limeedge.onnx.OnnxEngines
import java.io.File

fun main(arguments: Array<String>) = runBlocking {
    val bundle = LimeBundle.open(File(arguments[0]))
    LimeSession.open(bundle, OnnxEngines()).use { session ->
        session.use(arguments[1])
        session.generate(ChatFormat.of(bundle).render(listOf(Turn("user", arguments[2])))).collect { print(it) }
    }
}
