package androidx.compose.foundation

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier

class ScrollState

@Composable
fun rememberScrollState(): ScrollState = TODO()

fun Modifier.verticalScroll(state: ScrollState): Modifier = TODO("$state")

fun Modifier.horizontalScroll(state: ScrollState): Modifier = TODO("$state")
