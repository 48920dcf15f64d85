/// IEEE 754 half precision: what expert vectors are stored in. By hand: Intel Macs have no `Float16`.
package enum Half {
    /// The value of a finite half, exact. Infinities and NaN: see ``isFinite(_:)``.
    @inline(__always)
    package static func toFloat(_ bits: UInt16) -> Float {
        // exponent and mantissa put where a float has them; its exponent bias is larger by 112, subnormals included
        let magnitude = Float(bitPattern: UInt32(bits & 0x7FFF) << 13) * twoTo112
        return Float(bitPattern: magnitude.bitPattern | UInt32(bits & 0x8000) << 16)
    }

    /// Whether the bits are a number: an exponent of all ones is not.
    @inline(__always)
    package static func isFinite(_ bits: UInt16) -> Bool { bits & 0x7C00 != 0x7C00 }

    /// The nearest half, of two equally near ones the even; beyond 65,504 infinity.
    package static func fromFloat(_ value: Float) -> UInt16 {
        let sign = UInt16(truncatingIfNeeded: value.bitPattern >> 16) & 0x8000
        let magnitude = value.bitPattern & 0x7FFF_FFFF
        if magnitude > 0x7F80_0000 { return sign | 0x7E00 } // NaN
        if magnitude >= 0x477F_F000 { return sign | 0x7C00 } // 65,520 and more
        if magnitude < 0x3880_0000 { // below 2^-14: a multiple of 2^-24
            return sign | UInt16((Float(bitPattern: magnitude) * 0x1p24).rounded(.toNearestOrEven))
        }
        let rounded = magnitude + 0xFFF + (magnitude >> 13 & 1)
        return sign | UInt16(truncatingIfNeeded: (rounded - 0x3800_0000) >> 13)
    }

    private static let twoTo112 = Float(bitPattern: (127 + 112) << 23)
}
