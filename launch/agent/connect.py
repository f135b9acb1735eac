"""How an agent that was started on another machine finds its owner, and knows that it is the one.

Both sides hold a key that only the run's user can read. Each proves to the other that it has it,
and neither says it: what is heard on the network is of no use to anybody.
"""

import hashlib
import hmac
import json
import os
import socket

_CONNECT_SECONDS = 30.0
_NONCE_BYTES = 32
_MOST_BYTES = 4096  # Of one message of the greeting.


def new_key():
    """A key for one attempt."""
    return os.urandom(32).hex()


def nonce():
    """A word that was never said before."""
    return os.urandom(_NONCE_BYTES).hex()


def proof(key, role, theirs, ours):
    """What shows that one has the key: `role` is `owner` or `agent`, the nonces are the other
    side's and one's own."""
    text = "%s %s %s" % (role, theirs, ours)
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()


def same(one, other):
    """Whether two proofs are the same, in a time that says nothing of where they differ."""
    return hmac.compare_digest(str(one), str(other))


def send(connection, **message):
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection):
    """Receive one message, and nothing of what follows it."""
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1)
        if not more or len(data) > _MOST_BYTES:
            raise OSError("the other side does not greet")
        data += more
    message = json.loads(data)
    if not isinstance(message, dict):
        raise OSError("the other side greets in another way")
    return message


def find_owner(door, host):
    """Connect to the owner of this host's agent and make it standard input and output.

    Args:
      door: the file in which the owner says where it is, with the key.
      host: this host's name.

    Raises:
      OSError: there is nobody, or somebody else.
    """
    with open(door) as file:
        said = json.load(file)
    connection = socket.create_connection((said["address"], said["port"]), _CONNECT_SECONDS)
    mine = nonce()
    send(connection, host=host, nonce=mine)
    answer = receive(connection)
    theirs = str(answer.get("nonce"))
    if not same(answer.get("proof"), proof(said["key"], "owner", mine, theirs)):
        raise OSError("%s:%s is not the owner" % (said["address"], said["port"]))
    send(connection, proof=proof(said["key"], "agent", theirs, mine))
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for fd in (0, 1):
        os.dup2(connection.fileno(), fd)
    connection.close()
