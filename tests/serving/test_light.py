"""What the server's process imports."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_imports_no_torch_and_no_ray_before_it_needs_them() -> None:
    modules = ", ".join(
        f"detrkit.serving.{name}" for name in ("app", "local", "replicas", "server", "service")
    )
    heavy = "{'torch', 'transformers', 'ray'}"
    code = f"import sys, detrkit.cli.serve, {modules}\nprint([*{heavy} & set(sys.modules)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
