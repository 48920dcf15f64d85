package androidx.compose.material3

import androidx.compose.foundation.layout.ColumnScope
import androidx.compose.foundation.layout.RowScope
import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.text.TextStyle
import androidx.compose.ui.text.font.FontFamily

class Typography {
    val headlineSmall: TextStyle = TextStyle()
}

object MaterialTheme {
    val typography: Typography = Typography()
}

@Composable
fun MaterialTheme(content: @Composable () -> Unit): Unit = TODO("$content")

@Composable
fun Text(text: String, modifier: Modifier = Modifier, fontFamily: FontFamily? = null, style: TextStyle? = null): Unit = TODO("$text $modifier $fontFamily $style")

@Composable
fun Button(onClick: () -> Unit, modifier: Modifier = Modifier, enabled: Boolean = true, content: @Composable RowScope.() -> Unit): Unit =
    TODO("$onClick $modifier $enabled $content")

@Composable
fun TextButton(onClick: () -> Unit, modifier: Modifier = Modifier, enabled: Boolean = true, content: @Composable RowScope.() -> Unit): Unit =
    TODO("$onClick $modifier $enabled $content")

@Composable
fun Card(modifier: Modifier = Modifier, content: @Composable ColumnScope.() -> Unit): Unit = TODO("$modifier $content")

@Composable
fun FilterChip(selected: Boolean, onClick: () -> Unit, label: @Composable () -> Unit, modifier: Modifier = Modifier): Unit =
    TODO("$selected $onClick $label $modifier")

@Composable
fun LinearProgressIndicator(modifier: Modifier = Modifier): Unit = TODO("$modifier")

@Composable
fun OutlinedTextField(value: String, onValueChange: (String) -> Unit, modifier: Modifier = Modifier): Unit = TODO("$value $onValueChange $modifier")
