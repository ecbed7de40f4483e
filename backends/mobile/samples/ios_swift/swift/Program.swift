import CProgram
import Foundation

/// The compiled program. Inputs: {{inputs}}. Outputs: {{outputs}}.
public final class Program {
    public struct Failure: Error { public let reason: String }

    private let program: OpaquePointer

    /// `plan` and `parameters`: paths of the two files; `library`: of the kernels, as the app embeds them.
    public init(plan: String, parameters: String, library: String = Program.embedded) throws {
        var reason = [CChar](repeating: 0, count: 256)
        guard let opened = qc_open(library, plan, parameters, &reason, reason.count) else {
            throw Failure(reason: String(cString: reason))
        }
        program = opened
    }

    deinit { qc_close(program) }

    public static var embedded: String { {{library}} }

    /// The outputs, in order, for 8-byte integers such as token ids: every input is `shape`, filled from `values`.
    public func run(_ values: [[Int64]], shape: [Int64]) throws -> [Data] {
        var held = values
        var given = (0..<held.count).map { qc_input(program, $0) }
        for number in given.indices {
            withUnsafeMutablePointer(to: &given[number].shape) { tuple in
                tuple.withMemoryRebound(to: Int64.self, capacity: 8) { axes in
                    for (axis, extent) in shape.enumerated() { axes[axis] = extent }
                }
            }
            let bytes = UnsafeMutableRawPointer.allocate(byteCount: held[number].count * 8, alignment: 8)
            held[number].withUnsafeBytes { bytes.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
            given[number].data = bytes
        }
        defer { given.forEach { $0.data.deallocate() } }
        var made = [qc_tensor](repeating: qc_tensor(), count: qc_output_count(program))
        guard qc_run(program, &given, &made) == 0 else { throw Failure(reason: String(cString: qc_error(program))) }
        return made.map { Data(bytes: $0.data, count: Program.size(of: $0)) }
    }

    private static func size(of tensor: qc_tensor) -> Int {
        withUnsafeBytes(of: tensor.shape) { raw in
            raw.bindMemory(to: Int64.self).prefix(Int(tensor.rank)).reduce(Int(tensor.bits) / 8) { $0 * Int($1) }
        }
    }
}
