package limeedge.example

import android.app.Application
import android.content.ContentResolver
import android.content.Intent
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.android.describePhone
import limeedge.android.findOperators
import limeedge.android.findSharedFiles
import limeedge.app.BenchmarkRequest
import limeedge.app.BundleStore
import limeedge.app.ChatModel
import limeedge.onnx.OnnxEngines
import java.io.IOException

/** What the screens show beside the chat: bundles, a notice, the benchmark's document. */
data class AppState(
    val bundles: List<String> = emptyList(),
    val opened: String? = null,
    val isBusy: Boolean = false,
    val notice: String? = null,
    val benchmark: String? = null,
)

/** Bundles, the open session and its chat; survives a turn of the phone. Everything slow runs off the main thread. */
class AppModel(application: Application) : AndroidViewModel(application) {
    private val files = application.filesDir
    private val store = BundleStore(files, application.cacheDir)
    private val engines = OnnxEngines(findOperators())
    private val mutable = MutableStateFlow(AppState(store.list()))
    private var session: LimeSession? = null

    val state: StateFlow<AppState> = mutable.asStateFlow()

    /** The chat of the opened bundle. */
    var chat: ChatModel? = null
        private set

    fun open(name: String) = act {
        close()
        val opened = LimeSession.open(store.open(name), engines)
        session = opened
        chat = ChatModel(opened, viewModelScope)
        mutable.update { it.copy(opened = name) }
    }

    fun leave() = act {
        close()
        mutable.update { it.copy(opened = null) }
    }

    /** A file from the share sheet: a bundle is unpacked, a skill is kept and installed where a bundle is open. */
    fun take(intent: Intent, resolver: ContentResolver) = act {
        for (file in findSharedFiles(intent, resolver)) {
            if (file.name.endsWith(".tar")) {
                val name = file.open().use { store.add(file.name, it) }
                mutable.update { it.copy(bundles = store.list(), notice = "$name was added") }
            } else {
                val skill = file.open().use { store.keepSkill(file.name, it) }
                chat?.install(skill) ?: mutable.update { it.copy(notice = "${skill.name} was kept: open a bundle to install it") }
            }
        }
    }

    fun installKept() = act {
        for (skill in store.skills().values) chat?.install(skill)?.join()
    }

    fun benchmark(name: String) = act {
        close()
        val request = BenchmarkRequest.read { if (it == "bundle") name else null }
        val file = request.run(files, getApplication<Application>().cacheDir, engines, describePhone(getApplication()))
        mutable.update { it.copy(opened = null, benchmark = file.readText()) }
    }

    fun dismiss() = mutable.update { it.copy(notice = null, benchmark = null) }

    private suspend fun close() {
        chat?.stop()
        chat?.clear()?.join() // the session is free when its last call has ended
        chat = null
        session?.close()
        session = null
    }

    private fun act(action: suspend () -> Unit) {
        viewModelScope.launch {
            mutable.update { it.copy(isBusy = true, notice = null) }
            try {
                withContext(Dispatchers.Default) { action() }
            } catch (error: LimeError) {
                mutable.update { it.copy(notice = error.message) }
            } catch (error: IOException) {
                mutable.update { it.copy(notice = error.message) }
            } finally {
                mutable.update { it.copy(isBusy = false) }
            }
        }
    }

    override fun onCleared() {
        session?.close()
    }
}
