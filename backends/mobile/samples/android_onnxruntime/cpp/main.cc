// Runs the program once on a batch of one, {{length}} ones long, with an empty past: ./sample model.ort
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

template <class T>
Ort::Value ones(std::vector<std::vector<char>>& held, const std::vector<int64_t>& shape, size_t count) {
  held.emplace_back(count * sizeof(T));
  T* data = reinterpret_cast<T*>(held.back().data());
  for (size_t i = 0; i < count; ++i) data[i] = T(1);
  static const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, data, count, shape.data(), shape.size());
}

int main(int, char** arguments) {
  Ort::Env environment;
  Ort::Session session(environment, arguments[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> inputs, outputs;
  std::vector<Ort::Value> feeds;
  std::vector<std::vector<char>> held;
  held.reserve(session.GetInputCount());
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
    const auto type = session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::vector<int64_t> shape = info.GetShape();
    size_t count = 1;
    const int64_t open = inputs.back().rfind("past", 0) == 0 ? 0 : {{length}};
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] < 0) shape[axis] = axis == 0 ? 1 : open;
      count *= size_t(shape[axis]);
    }
    switch (info.GetElementType()) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: feeds.push_back(ones<int64_t>(held, shape, count)); break;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: feeds.push_back(ones<int32_t>(held, shape, count)); break;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: feeds.push_back(ones<float>(held, shape, count)); break;
      default: std::fprintf(stderr, "write the input %s yourself\n", inputs.back().c_str()); return 1;
    }
  }
  for (size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
  std::vector<const char*> from, to;
  for (const std::string& name : inputs) from.push_back(name.c_str());
  for (const std::string& name : outputs) to.push_back(name.c_str());
  const auto results = session.Run(Ort::RunOptions{}, from.data(), feeds.data(), feeds.size(), to.data(), to.size());
  for (size_t i = 0; i < results.size(); ++i)
    std::printf("%s: %zu values\n", to[i], results[i].GetTensorTypeAndShapeInfo().GetElementCount());
}
