// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Program",
    platforms: [.iOS(.v15)],
    products: [.library(name: "Program", targets: ["Program"])],
    targets: [
        .target(
            name: "CProgram", path: "native", exclude: ["main.c", "CMakeLists.txt"], publicHeadersPath: ".",
            linkerSettings: [.linkedFramework("Foundation"), .linkedFramework("Metal")]),
        .target(
            name: "Program", dependencies: ["CProgram"], path: ".",
            exclude: ["native", "program.json", "README.md", "SHA256SUMS", "manifest.json", "report.html"],
            sources: ["swift"],
            resources: [.copy("program.plan"), .copy("program.parameters"), .copy("program.metal")]),
    ])
