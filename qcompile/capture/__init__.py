"""Capture: ONNX files, Hugging Face folders and torch modules become the IR."""
