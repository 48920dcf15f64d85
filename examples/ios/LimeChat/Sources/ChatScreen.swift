import LimeEdge
import SwiftUI
import UniformTypeIdentifiers

/// Pick a bundle, then chat.
struct ChatTab: View {
    let store: BundleStore
    @State private var names: [String] = []
    @State private var chat: ChatModel?
    @State private var fault: String?

    var body: some View {
        NavigationStack {
            if let chat {
                ChatScreen(chat: chat).toolbar { Button("Close") { self.chat = nil } }
            } else {
                List(names, id: \.self) { name in
                    Button(name) { Task { await open(name) } }
                }
                .overlay { if names.isEmpty { ContentUnavailableView("No bundle", systemImage: "shippingbox", description: Text("Put one into this app's folder with the Files app.")) } }
                .navigationTitle("Bundles")
                .task { await refresh() }
                .refreshable { await refresh() }
            }
        }
        .alert("It did not work", isPresented: Binding(get: { fault != nil }, set: { _ in fault = nil })) {} message: { Text(fault ?? "") }
    }

    private func refresh() async {
        do { names = try await Task.detached { [store] in try store.list() }.value } catch { fault = "\(error)" }
    }

    private func open(_ name: String) async {
        do { chat = try await ChatModel(LimeSession.open(store.bundle(name), with: engines)) } catch { fault = "\(error)" }
    }
}

/// Skills as chips, the conversation, a line to write in.
struct ChatScreen: View {
    let chat: ChatModel
    @State private var text = ""
    @State private var isImporting = false

    var body: some View {
        VStack {
            ScrollView(.horizontal) {
                HStack {
                    ForEach(chat.skills, id: \.self) { skill in
                        Button(skill) { chat.select(skill) }
                            .buttonStyle(.bordered)
                            .tint(skill == chat.selected ? .accentColor : .gray)
                    }
                    Button("Add", systemImage: "plus") { isImporting = true }
                }
                .padding(.horizontal)
            }
            ScrollView {
                LazyVStack(alignment: .leading) { ForEach(chat.lines) { LineView(line: $0) } }.padding()
            }
            if let notice = chat.notice { Text(notice).font(.footnote).foregroundStyle(.secondary).padding(.horizontal) }
            HStack {
                TextField("Say something", text: $text).textFieldStyle(.roundedBorder).onSubmit(send)
                Button("All skills") { chat.askAll(take()) }.disabled(text.isEmpty)
                if chat.isBusy { Button("Stop", systemImage: "stop.fill") { chat.stop() } } else { Button("Send", systemImage: "paperplane", action: send).disabled(text.isEmpty) }
            }
            .labelStyle(.iconOnly)
            .padding()
        }
        .fileImporter(isPresented: $isImporting, allowedContentTypes: [.data]) { if case .success(let file) = $0 { chat.install(file) } }
    }

    private func send() { chat.say(take()) }

    private func take() -> String {
        defer { text = "" }
        return text
    }
}

private struct LineView: View {
    let line: Line

    var body: some View {
        VStack(alignment: line.fromUser ? .trailing : .leading) {
            if !line.skill.isEmpty { Text(line.skill).font(.caption).foregroundStyle(.secondary) }
            Text(line.text + (line.isOpen ? "…" : ""))
                .padding(8)
                .background(line.fromUser ? Color.accentColor.opacity(0.2) : Color.gray.opacity(0.15), in: .rect(cornerRadius: 12))
        }
        .frame(maxWidth: .infinity, alignment: line.fromUser ? .trailing : .leading)
    }
}
