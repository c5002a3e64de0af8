"""What the engines are called."""

EXPORTED_ENGINES = ("onnx", "openvino")
ENGINES = ("torch", "compile", *EXPORTED_ENGINES)

TRANSFORMERS_JS = "transformers.js"
"""The format of folders for the npm package, which no engine of detrkit runs."""
