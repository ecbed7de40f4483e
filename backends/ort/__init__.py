"""Rewrites of the IR into the spellings that ONNX Runtime's CPU provider runs fastest, one file a subject."""
