package limeedge.android

import android.app.Activity
import android.os.Bundle
import android.util.Log
import android.view.WindowManager
import limeedge.LimeError
import limeedge.app.BenchmarkRequest
import limeedge.onnx.OnnxEngines
import kotlin.concurrent.thread

/**
 * A benchmark without a screen, driven by adb:
 *
 *     adb shell am start -W -n limeedge.example/limeedge.android.BenchmarkActivity --es bundle smollm2 --es threads 4
 *     adb logcat -s LimeBench:I                      ends with "done" or "failed"
 *     adb exec-out run-as limeedge.example cat files/bench.json > phone.json
 */
public class BenchmarkActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON) // a phone that sleeps is slow
        thread(name = "bench") {
            try {
                val request = BenchmarkRequest.read { intent.getStringExtra(it) }
                val file = request.run(filesDir, cacheDir, OnnxEngines(findOperators()), describePhone(this)) { done, all -> Log.i(TAG, "round $done of $all") }
                Log.i(TAG, "done: $file")
            } catch (error: LimeError) {
                Log.e(TAG, "failed: ${error.message}")
            } catch (error: Exception) {
                Log.e(TAG, "failed", error)
            }
            runOnUiThread { finish() }
        }
    }

    private companion object {
        private const val TAG = "LimeBench"
    }
}
