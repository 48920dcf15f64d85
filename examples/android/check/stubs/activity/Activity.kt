// Signatures from androidx's documentation; nothing here runs.
package androidx.activity

import android.app.Activity
import android.content.Intent
import androidx.lifecycle.ViewModel

open class ComponentActivity : Activity() {
    override fun onNewIntent(intent: Intent) {}
}

inline fun <reified VM : ViewModel> ComponentActivity.viewModels(): Lazy<VM> = TODO()
