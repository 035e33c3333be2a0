"""A program on a terminal of our own: keys go in as bytes, what it draws is read by an emulator (pyte)."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time

import pyte

CALM = 5  # times that nothing was said
PATIENCE = 30.0  # seconds; a busy machine is slow
ENTER, TAB, BACKSPACE, ESCAPE, END = b"\r", b"\t", b"\x7f", b"\x1b", b"\x1b[F"
CTRL_C, CTRL_Q, F6 = b"\x03", b"\x11", b"\x1b[17~"
OURS = ("NO_COLOR", "LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "TEXTUAL_DRIVER", "COLUMNS", "LINES")
# Private modes that are off in a terminal as a shell has it: mouse reports, focus, paste, the other screen.
OFF = (1000, 1002, 1003, 1004, 1006, 1015, 1049, 2004)


class Terminal:
    """A child on a pseudo-terminal, as its controlling one."""

    def __init__(self, arguments, size=(80, 24), environment=None, folder=None):
        self.near, self._far = pty.openpty()
        termios.tcsetwinsize(self._far, (size[1], size[0]))
        self._before = termios.tcgetattr(self._far)
        self.screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self.screen)
        self.said = b""
        kept = {name: value for name, value in os.environ.items() if name not in OURS}
        self.process = subprocess.Popen(
            arguments,
            stdin=self._far,
            stdout=self._far,
            stderr=self._far,
            env={**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(environment or {})},
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.near)
        os.close(self._far)

    def listen(self, seconds=0.02):
        """Take what is said for so long."""
        if select.select([self.near], [], [], seconds)[0]:
            words = os.read(self.near, 1 << 16)
            self.said += words
            # pyte knows no sequence with a sub-parameter or a private prefix of these kinds.
            self._stream.feed(re.sub(rb"\x1b\[[<>=][0-9;]*[a-zA-Z]|\x1b\[\?[0-9;]*\$p|\x1bP.*?\x1b\\", b"", words))

    @property
    def text(self):
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, condition, what="it"):
        """Wait; `condition` is asked after everything that is said."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{what} never came:\n{self.text}"
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}\n{self.said[-2000:]!r}"
            self.listen()

    def sees(self, *words):
        """Wait until all these words are on the screen and it is drawn: a question is focused after it is seen."""
        self.until(lambda: all(word in self.text for word in words), " and ".join(words))
        self._rest()

    def _rest(self):
        """Until nothing is drawn for a moment."""
        quiet = 0
        while quiet < CALM:
            before = len(self.said)
            self.listen()
            quiet = quiet + 1 if len(self.said) == before else 0

    def types(self, *keys):
        """Keys, one after the other."""
        for key in keys:
            os.write(self.near, key if isinstance(key, bytes) else key.encode())
            self.listen(0.05)  # Esc and what follows are two keys

    def clicks(self, word):
        """A click on a word, as a terminal reports it."""
        self._rest()
        row, line = next((row, line) for row, line in enumerate(self.screen.display) if word in line)
        place = f"{line.index(word) + 1};{row + 1}"
        self.types(f"\x1b[<0;{place}M\x1b[<0;{place}m")

    def resize(self, columns, lines):
        """Another size; the program is told."""
        self.screen.resize(lines, columns)
        termios.tcsetwinsize(self._far, (lines, columns))
        os.killpg(self.process.pid, signal.SIGWINCH)

    def end(self, seconds=PATIENCE):
        """Wait for the child's end: its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still there after {seconds} s:\n{self.text}"
            self.listen()
        for _ in range(10):
            self.listen(0.01)
        return self.process.returncode

    def wrong(self):
        """What is not as a shell wants its terminal."""
        states = {int(mode): state for mode, state in re.findall(rb"\x1b\[\?(\d+)([hl])", self.said)}
        found = [f"?{mode} is on" for mode in OFF if states.get(mode) == b"h"]
        found += ["the cursor is hidden"] if states.get(25) == b"l" else []
        return found + (["stty differs"] if termios.tcgetattr(self._far) != self._before else [])
