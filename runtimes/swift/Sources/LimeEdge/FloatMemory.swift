/// float32 numbers that engines read without copying them.
final class FloatMemory {
    let values: UnsafeMutableBufferPointer<Float>

    /// `count` zeros.
    init(_ count: Int) {
        let raw = UnsafeMutableRawBufferPointer.allocate(byteCount: max(count, 1) * MemoryLayout<Float>.stride, alignment: 64)
        raw.initializeMemory(as: UInt8.self, repeating: 0)
        values = UnsafeMutableBufferPointer(start: raw.bindMemory(to: Float.self).baseAddress, count: count)
    }

    var view: UnsafeBufferPointer<Float> { UnsafeBufferPointer(values) }

    deinit { UnsafeMutableRawPointer(values.baseAddress)?.deallocate() }
}
