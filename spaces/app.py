"""The demo of detrkit as a Hugging Face Space."""

import os

from detrkit.demo.server import serve

if __name__ == "__main__":
    serve(os.environ.get("DETRKIT_MODELS", "").split(), host="0.0.0.0")
