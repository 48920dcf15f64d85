package limeedge.example

import androidx.compose.foundation.horizontalScroll
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.Card
import androidx.compose.material3.FilterChip
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.collectAsState
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.text.font.FontFamily
import androidx.compose.ui.unit.dp
import limeedge.app.ChatModel
import limeedge.app.Line

/** Everything: the benchmark's document, the chat of the opened bundle, or the bundles to pick from. */
@Composable
fun App(model: AppModel) {
    val state by model.state.collectAsState()
    MaterialTheme {
        Column(Modifier.fillMaxSize().safeDrawingPadding().padding(12.dp)) {
            if (state.isBusy) LinearProgressIndicator(Modifier.fillMaxWidth())
            state.notice?.let { Notice(it) }
            val chat = model.chat
            when {
                state.benchmark != null -> Document(state.benchmark.orEmpty(), model::dismiss)
                state.opened != null && chat != null -> Chat(chat, model)
                else -> Bundles(state.bundles, model)
            }
        }
    }
}

@Composable
private fun Notice(text: String) {
    Card(Modifier.fillMaxWidth().padding(vertical = 4.dp)) { Text(text, Modifier.padding(8.dp)) }
}

@Composable
private fun Bundles(names: List<String>, model: AppModel) {
    Text("Bundles", style = MaterialTheme.typography.headlineSmall)
    if (names.isEmpty()) Text("None yet: share a .tar that lime-edge pack wrote with this app.")
    for (name in names) {
        Row(Modifier.fillMaxWidth(), horizontalArrangement = Arrangement.SpaceBetween) {
            TextButton(onClick = { model.open(name) }) { Text(name) }
            TextButton(onClick = { model.benchmark(name) }) { Text("Benchmark") }
        }
    }
}

@Composable
private fun Document(text: String, close: () -> Unit) {
    Column {
        TextButton(onClick = close) { Text("Close") }
        Text(text, Modifier.verticalScroll(rememberScrollState()), fontFamily = FontFamily.Monospace)
    }
}

@Composable
private fun Chat(chat: ChatModel, model: AppModel) {
    val state by chat.state.collectAsState()
    var text by rememberSaveable { mutableStateOf("") }
    Column(Modifier.fillMaxSize()) {
        Row {
            TextButton(onClick = { model.leave() }) { Text("Bundles") }
            TextButton(onClick = { chat.clear() }) { Text("New") }
            TextButton(onClick = { model.installKept() }) { Text("Add kept skills") }
        }
        Row(Modifier.horizontalScroll(rememberScrollState()), horizontalArrangement = Arrangement.spacedBy(6.dp)) {
            for (skill in state.skills) {
                FilterChip(selected = skill == state.selected, onClick = { chat.select(skill) }, label = { Text(skill) })
            }
        }
        state.notice?.let { Notice(it) }
        LazyColumn(Modifier.weight(1f).fillMaxWidth()) {
            items(state.lines) { Bubble(it) }
        }
        OutlinedTextField(value = text, onValueChange = { text = it }, modifier = Modifier.fillMaxWidth())
        Row(horizontalArrangement = Arrangement.spacedBy(6.dp)) {
            Button(onClick = { chat.say(text).also { text = "" } }, enabled = text.isNotBlank()) { Text("Send") }
            Button(onClick = { chat.askAll(text) }, enabled = text.isNotBlank()) { Text("All skills") }
            if (state.isBusy) TextButton(onClick = { chat.stop() }) { Text("Stop") }
        }
    }
}

@Composable
private fun Bubble(line: Line) {
    val who = if (line.fromUser) "you" else line.skill
    Text("$who: ${line.text}${if (line.isOpen) " ▍" else ""}", Modifier.fillMaxWidth().padding(vertical = 4.dp))
}
