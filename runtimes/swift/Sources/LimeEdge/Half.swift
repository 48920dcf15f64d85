/// IEEE 754 half precision: what expert vectors are stored in. By hand: Intel Macs have no `Float16`.
enum Half {
    /// The value of a finite half, exact. Infinities and NaN: see ``isFinite(_:)``.
    @inline(__always)
    static func toFloat(_ bits: UInt16) -> Float {
        // exponent and mantissa put where a float has them; its exponent bias is larger by 112, subnormals included
        let magnitude = Float(bitPattern: UInt32(bits & 0x7FFF) << 13) * twoTo112
        return Float(bitPattern: magnitude.bitPattern | UInt32(bits & 0x8000) << 16)
    }

    /// Whether the bits are a number: an exponent of all ones is not.
    @inline(__always)
    static func isFinite(_ bits: UInt16) -> Bool { bits & 0x7C00 != 0x7C00 }

    private static let twoTo112 = Float(bitPattern: (127 + 112) << 23)
}
