// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Program",
    platforms: [.iOS(.v15)],
    products: [.library(name: "Program", targets: ["Program"])],
    targets: [
        .binaryTarget(name: "Kernels", path: "Kernels.xcframework"),
        .target(
            name: "CProgram", path: "native", exclude: ["main.c", "CMakeLists.txt"], publicHeadersPath: "."),
        .target(
            name: "Program", dependencies: ["CProgram", "Kernels"], path: ".",
            exclude: ["native", "Kernels.xcframework", "README.md", "SHA256SUMS", "manifest.json", "report.html"],
            sources: ["swift"], resources: [.copy("program.plan"), .copy("program.parameters")]),
    ])
