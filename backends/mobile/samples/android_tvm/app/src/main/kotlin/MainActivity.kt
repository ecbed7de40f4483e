package nn.qcompile.sample

import android.app.Activity
import android.os.Bundle
import android.widget.TextView
import java.io.File

/** Runs the program once on ones and shows what came out. */
class MainActivity : Activity() {
    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        for (name in listOf({{assets}})) {
            assets.open(name).use { from -> File(filesDir, name).outputStream().use { from.copyTo(it) } }
        }
        setContentView(TextView(this).apply { text = run({{library}}, filesDir.path, {{length}}) })
    }

    private external fun run(library: String, folder: String, length: Int): String

    companion object { init { System.loadLibrary("sample") } }
}
