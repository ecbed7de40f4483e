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
    sourceSets["main"].assets.srcDir(layout.buildDirectory.dir("program"))
    androidResources { noCompress += "ort" }
}

// The program lies two folders up; only it goes into the app.
val program by tasks.registering(Copy::class) {
    from("../../model.ort")
    into(layout.buildDirectory.dir("program"))
}
tasks.named("preBuild") { dependsOn(program) }

dependencies { implementation("com.microsoft.onnxruntime:onnxruntime-android:{{version}}") }
