"""ONNX ops that layers emit at trace time: one module each."""
