plugins {
    id("com.android.application") version "8.7.3"
    id("org.jetbrains.kotlin.android") version "2.1.0"
}

android {
    namespace = "nn.qcompile.sample"
    compileSdk = 35
    defaultConfig {
        applicationId = "nn.qcompile.sample"
        minSdk = 24
        targetSdk = 35
        ndk { abiFilters += "{{abi}}" }
    }
    externalNativeBuild { cmake { path("src/main/cpp/CMakeLists.txt") } }
    sourceSets["main"].assets.srcDir(layout.buildDirectory.dir("program"))
    sourceSets["main"].jniLibs.srcDir(layout.buildDirectory.dir("library"))
    packaging { jniLibs { useLegacyPackaging = true } } // unpacked, so that dlopen finds it by its path
}

// The program lies two folders up.
val program by tasks.registering(Copy::class) {
    from(listOf({{assets}}).map { "../../$it" })
    into(layout.buildDirectory.dir("program"))
}
// Where there is a library: source for the GPU is one of the assets.
val library by tasks.registering(Copy::class) {
    from("../../libprogram.so")
    into(layout.buildDirectory.dir("library/{{abi}}"))
}
tasks.named("preBuild") { dependsOn(program, library) }
