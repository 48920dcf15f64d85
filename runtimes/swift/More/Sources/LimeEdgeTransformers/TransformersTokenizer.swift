import LimeEdge
import Tokenizers

/// A tokenizer of swift-transformers for a session, where the bundle's own is of a kind that this library does not know:
/// `LimeSession.open(folder, with: engines, tokenizer: TransformersTokenizer(tokenizer))`.
public struct TransformersTokenizer: TextTokenizer {
    private let tokenizer: any Tokenizers.Tokenizer

    /// From `AutoTokenizer.from(modelFolder:)` on the bundle's `tokenizer/`.
    public init(_ tokenizer: any Tokenizers.Tokenizer) { self.tokenizer = tokenizer }

    /// Token ids of a text; special tokens in it are recognised, none are added.
    public func encode(_ text: String) -> [Int] { tokenizer.encode(text: text, addSpecialTokens: false) }

    /// Text of token ids, special tokens left out.
    public func decode(_ ids: [Int]) -> String { tokenizer.decode(tokens: ids, skipSpecialTokens: true) }
}
