package limeedge.android

import android.app.ActivityManager
import android.content.Context
import android.os.Build

/** Facts of the phone, by the names of docs/bench-schema.md: what /proc does not tell. */
public fun describePhone(context: Context): Map<String, Any?> {
    val memory = ActivityManager.MemoryInfo().also { (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it) }
    return mapOf(
        "board" to "${Build.MANUFACTURER} ${Build.MODEL} (${Build.BOARD})",
        "system" to "Android ${Build.VERSION.RELEASE}, API ${Build.VERSION.SDK_INT}",
        "memory_bytes" to memory.totalMem,
    )
}

/** Our operators where the app packs them and the processor runs them: 64-bit ARM. */
public fun findOperators(): String? = "liblime_edge_operators.so".takeIf { Build.SUPPORTED_ABIS.firstOrNull() == "arm64-v8a" }
