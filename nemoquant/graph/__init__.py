"""ONNX graphs over the packed bytes of a checkpoint."""

MODEL, MTP = "model.onnx", "mtp.onnx"  # files of the main graph, and of the multi-token-prediction module
