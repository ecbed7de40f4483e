package nn.qcompile.sample

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.TensorInfo
import android.app.Activity
import android.os.Bundle
import android.widget.TextView
import java.nio.ByteBuffer

/** Runs the program once on a batch of one, {{length}} ones long, with an empty past, and shows what came out. */
class MainActivity : Activity() {
    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val environment = OrtEnvironment.getEnvironment()
        val program = assets.open("model.ort").use { it.readBytes() }
        val text = StringBuilder()
        environment.createSession(program).use { session ->
            val feeds = session.inputInfo.mapValues { (name, node) -> ones(environment, name, node.info as TensorInfo) }
            session.run(feeds).use { results ->
                for ((name, value) in results) text.append("$name: ${value.info}\n")
            }
        }
        setContentView(TextView(this).apply { this.text = text })
    }

    private fun ones(environment: OrtEnvironment, name: String, info: TensorInfo): OnnxTensor {
        val free = if (name.startsWith("past")) 0L else {{length}}L
        val shape = info.shape.mapIndexed { axis, extent -> if (extent >= 0) extent else if (axis == 0) 1L else free }
            .toLongArray()
        val count = shape.fold(1L) { product, extent -> product * extent }.toInt()
        return when (info.type) {
            OnnxJavaType.INT64 -> OnnxTensor.createTensor(environment, java.nio.LongBuffer.wrap(LongArray(count) { 1 }), shape)
            OnnxJavaType.INT32 -> OnnxTensor.createTensor(environment, java.nio.IntBuffer.wrap(IntArray(count) { 1 }), shape)
            OnnxJavaType.FLOAT -> OnnxTensor.createTensor(environment, java.nio.FloatBuffer.wrap(FloatArray(count) { 1f }), shape)
            else -> OnnxTensor.createTensor(environment, ByteBuffer.allocateDirect(count), shape, info.type)
        }
    }
}
