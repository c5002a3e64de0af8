"""A process that has imported torch and detrkit already and forks for each command or page.

Importing takes seconds, and the pages have dozens of commands. ``serve`` runs in the process; whoever asks
sends its standard streams along, so that the work is done as if the asker did it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path

# What a command line calls instead of the installed program; needs nothing but the standard library.
PROGRAM = """\
#!{python} -SE
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
message = {{"kind": "program", "arguments": sys.argv[1:], "folder": os.getcwd()}}
socket.send_fds(asked, [json.dumps(message).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(asked.makefile().readline() or 1))
"""


def serve(address: str) -> None:
    """Answers one asker after another, each in a process of its own, until it is killed.

    The message is a line of JSON: ``kind`` "program" with the command line's ``arguments``, or "python",
    after which each line is code to run in one namespace. The answer is a line with the exit status for each.
    """
    import torch

    import detrkit
    import detrkit.cli
    import detrkit.evaluation
    import detrkit.training.run

    for name in detrkit.__all__:
        getattr(detrkit, name)
    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            asker, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(asker)
            asker.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _answer(asker: socket.socket) -> None:
    line, streams, _, _ = socket.recv_fds(asker, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # The streams of this process remember what kind of file its own were.
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    message = json.loads(line)
    os.chdir(message["folder"])
    sys.path.insert(0, "")
    status = 1
    try:
        if message["kind"] == "program":
            from detrkit.cli import run

            sys.argv = ["detrkit", *message["arguments"]]
            status = run(message["arguments"])
            _flush()
            asker.sendall(b"%d\n" % status)
        else:
            namespace: dict[str, object] = {"__name__": "__main__"}
            for code in asker.makefile():
                asker.sendall(b"%d\n" % _execute(json.loads(code), namespace))
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _execute(code: str, namespace: dict[str, object]) -> int:
    try:
        exec(compile(code, "<block>", "exec"), namespace)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        _flush()
    return 0


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def install_program(folder: Path, address: str) -> None:
    """Puts ``detrkit`` into a folder for PATH; it asks the process at ``address``."""
    program = folder / "detrkit"
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)


if __name__ == "__main__":
    serve(sys.argv[1])
