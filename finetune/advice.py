"""What the words of ssh and of a node that does not start mean, and what to do."""

import re

_ADVICE = (
    (
        "reach",
        r"the launching side does not answer",
        "the nodes must reach each other on all ports; open the network there",
    ),
    (
        "host key",
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        (
            "its host key is another one than is known here. If the node was set up anew, compare the key with its own "
            "(ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there), remove the old one with ssh-keygen -R HOST, and connect "
            "once by hand; else somebody may stand in between"
        ),
    ),
    (
        "host key",
        r"No \S+ host key is known|Host key verification failed",
        (
            "its host key is not known here. Compare it with the node's own (ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub there), then connect once by hand, or give --ssh_host_keys accept-new"
        ),
    ),
    ("key", r"Permission denied", "this machine's public key is missing in ~/.ssh/authorized_keys there"),
    (
        "name",
        r"Could not resolve hostname|Name or service not known",
        "its name does not resolve here; give its address",
    ),
    ("reach", r"Connection refused", "no sshd listens on that port there; start it, or give its port with --ssh_port"),
    ("reach", r"timed out|No route to host|Network is unreachable", "it does not answer; is it up, and the port open?"),
    (
        "finebridge",
        r"No module named|No such file or directory|not found",
        "finebridge and its Python must be at the same path there",
    ),
)


def advice(said: str) -> tuple[str, str, str] | None:
    """What is wrong in a word, the line that tells it, and what to do; None for words that are not known."""
    for check, pattern, text in _ADVICE:
        if found := re.search(rf"^.*(?:{pattern}).*$", said, re.MULTILINE):
            return check, found[0].strip(" \r@"), text
    return None
