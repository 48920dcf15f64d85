// What LimeEdgeTransformers uses of swift-transformers, declared after its documentation: the compiler checks our calls against it.

public protocol Tokenizer: Sendable {
    func encode(text: String, addSpecialTokens: Bool) -> [Int]
    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String
}
