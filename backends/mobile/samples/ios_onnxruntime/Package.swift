// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "Program",
    platforms: [.iOS(.v15)],
    products: [.library(name: "Program", targets: ["Program"])],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", from: "1.20.0")
    ],
    targets: [
        // Copy ../model.ort to Sources/Program/model.ort first: a package takes resources from its own folder alone.
        .target(
            name: "Program",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            resources: [.copy("model.ort")])
    ])
