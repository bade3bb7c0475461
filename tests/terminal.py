"""Commands in a real terminal: what somebody in front of it reads."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def run_in_terminal(command, columns=80, stdin="", environment=None, folder=None, interrupt_after=None):
    """Run a command in a terminal of that width; its exit status and the text that is left on the screen.

    What `stdin` holds is typed at once; after `interrupt_after` seconds, if given, Ctrl+C.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 48, columns, 0, 0))
    given = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **(environment or {})}
    given.pop("COLUMNS", None)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=given, cwd=folder, start_new_session=True
    )
    os.close(theirs)
    interruption = threading.Timer(interrupt_after or 0, process.send_signal, [signal.SIGINT])
    if interrupt_after is not None:
        interruption.start()
    os.write(ours, stdin.encode())
    written = bytearray()
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    interruption.cancel()
    return process.wait(), on_screen(written.decode(errors="replace"))


def on_screen(text):
    """What is left of each line once whatever was written over is gone."""
    lines = ESCAPES.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(_line(line) for line in lines)


def _line(line):
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()
