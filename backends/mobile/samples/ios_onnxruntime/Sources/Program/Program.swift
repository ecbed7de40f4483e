import Foundation

#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings  // the Swift package
#else
import onnxruntime_objc  // the pod
#endif

/// The compiled program. Inputs: {{inputs}}. Outputs: {{outputs}}.
public final class Program {
    private let environment: ORTEnv
    private let session: ORTSession

    public init(path: String) throws {
        environment = try ORTEnv(loggingLevel: .warning)
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: nil)
    }

    /// The outputs by name.
    public func run(_ feeds: [String: ORTValue]) throws -> [String: ORTValue] {
        let outputs = Set(try session.outputNames())
        return try session.run(withInputs: feeds, outputNames: outputs, runOptions: nil)
    }

    /// A tensor of integers, such as token ids, of `shape`.
    public static func integers(_ values: [Int64], shape: [Int]) throws -> ORTValue {
        let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress!, length: $0.count) }
        let extents = shape.map { NSNumber(value: $0) }
        return try ORTValue(tensorData: data, elementType: .int64, shape: extents)
    }
}
