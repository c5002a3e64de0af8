"""What the engines are called."""

EXPORTED_ENGINES = ("onnx", "openvino")
ENGINES = ("torch", "compile", *EXPORTED_ENGINES)
