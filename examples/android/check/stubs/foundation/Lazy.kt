package androidx.compose.foundation.lazy

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier

interface LazyListScope

interface LazyItemScope

@Composable
fun LazyColumn(modifier: Modifier = Modifier, content: LazyListScope.() -> Unit): Unit = TODO("$modifier $content")

fun <T> LazyListScope.items(items: List<T>, itemContent: @Composable LazyItemScope.(T) -> Unit): Unit = TODO("$items $itemContent")
