package androidx.compose.foundation.layout

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.Dp

object Arrangement {
    interface Horizontal

    val Start: Horizontal = object : Horizontal {}
    val SpaceBetween: Horizontal = Start

    fun spacedBy(space: Dp): Horizontal = TODO("$space")
}

interface ColumnScope {
    fun Modifier.weight(weight: Float): Modifier
}

interface RowScope

@Composable
fun Column(modifier: Modifier = Modifier, content: @Composable ColumnScope.() -> Unit): Unit = TODO("$modifier $content")

@Composable
fun Row(modifier: Modifier = Modifier, horizontalArrangement: Arrangement.Horizontal = Arrangement.Start, content: @Composable RowScope.() -> Unit): Unit =
    TODO("$modifier $horizontalArrangement $content")

fun Modifier.fillMaxSize(): Modifier = TODO()

fun Modifier.fillMaxWidth(): Modifier = TODO()

fun Modifier.safeDrawingPadding(): Modifier = TODO()

fun Modifier.padding(all: Dp): Modifier = TODO("$all")

fun Modifier.padding(horizontal: Dp = Dp(0f), vertical: Dp = Dp(0f)): Modifier = TODO("$horizontal $vertical")
