package androidx.compose.ui.text.font

open class FontFamily {
    companion object {
        val Monospace: FontFamily = FontFamily()
    }
}
