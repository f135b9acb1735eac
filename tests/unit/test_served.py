"""The agent that owners come to."""

import os
import socket

from launch.agent import served


def test_its_socket_is_found_only_when_it_can_be_connected_to(monkeypatch, tmp_path):
    path = str(tmp_path / "socket")
    found = []

    class Watched(socket.socket):
        def listen(self, *arguments):
            found.append(os.path.exists(path))
            super().listen(*arguments)

    monkeypatch.setattr(served.socket, "socket", Watched)
    owner = served.Served(path)
    assert found == [False]
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(path)
    assert [os.path.basename(one) for one in os.listdir(tmp_path)] == ["socket"]
    assert owner.plan is None
