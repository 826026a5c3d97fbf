"""A server that is killed while it answers: noticed, the half answer kept and marked, gone on with when it is back."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.ui.chat_page import answered, endless, refusal, send, set_parameter, turns, writing

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

# A tiny network would be through before anybody could kill its server.
CHILD = """
import sys
from tests.service.ui.chat_page import slowed
from topkapi.engine.steps import DecoderNetwork
DecoderNetwork.run, DecoderNetwork.steps = slowed(DecoderNetwork.run), lambda *_: []
from topkapi.service.commands.cli import main
main(sys.argv[1:])
"""


class Server:
    """`topkapi serve` as a process of its own, on one port."""

    def __init__(self, checkpoint: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-c", CHILD, "serve", str(checkpoint), "--port", str(self.port)]

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = []
        for line in self.process.stdout:
            told.append(line)
            if line.startswith("Ready at "):
                return
        raise AssertionError(f"it ended: {told}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=20)


@pytest.fixture
def server(tiny_checkpoint: Callable[..., Path]) -> Server:
    return Server(tiny_checkpoint("mortal", context=4096))


@pytest.mark.slow
def test_a_lost_server_is_noticed_and_gone_on_with(browser, server, visiting) -> None:
    server.start()
    try:
        with visiting(browser, server.url) as page:
            set_parameter(page, "Maximum tokens", "400")
            set_parameter(page, "Seed", "5")
            endless(page)
            send(page, "Tell me")
            writing(page)
            server.kill()
            page.wait_for_selector("#connection.lost")
            facts = answered(page, 1, "broken off")
            assert "seed 5" in facts and "connection was lost" in page.inner_text(".turn.assistant .trouble")
            half = turns(page)[1]
            assert half
            # What is written meanwhile is refused where it is written, and kept.
            send(page, "And now?")
            assert "does not answer" in refusal(page)
            assert page.input_value("#message textarea") == "And now?" and turns(page) == ["Tell me", half]
            server.start()
            page.wait_for_selector("#connection.back")
            page.fill("#message textarea", "")
            page.click(".turn.assistant >> text=Go on")
            answered(page, 1)
            assert not page.is_visible(".trouble")
            assert "gone on with after" in page.inner_text(".turn.assistant .facts")
            assert len(turns(page)[1]) > len(half)
            page.reload()
            page.wait_for_selector(".turn.assistant")
            assert not page.is_visible(".trouble")
    finally:
        server.kill()
