"""The IR: an onnx_ir model in canonical form, its sites, and safe edits."""
