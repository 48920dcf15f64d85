package limeedge.example

import android.content.Intent
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.viewModels

/** The one activity: hands shared files to the model and shows its screens. */
class MainActivity : ComponentActivity() {
    private val model: AppModel by viewModels()

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContent { App(model) }
        if (savedInstanceState == null) model.take(intent, contentResolver)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        model.take(intent, contentResolver)
    }
}
