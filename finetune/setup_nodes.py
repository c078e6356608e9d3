"""``finebridge nodes setup``: does ssh reach all nodes without a password? What is missing is shown as commands.

    finebridge nodes setup [--hostfile FILE] [--ssh_port P] [--ssh_config FILE] [--ssh_host_keys known|accept-new]

The nodes are those of NODE_IP_LIST, --hostfile or Slurm, as a run would take them; run it where the run will be launched. It
logs in to each, changes nothing anywhere, and neither asks for nor sets a password. Exit code 0 when all is well; else 2,
with a table, a row a node, and the commands for each machine: run those and call it again. A node whose host key is not known
is not logged in to, so that a machine that stands in between learns nothing.
"""

import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..train.arguments import read_flags
from . import cluster
from .connect import Ssh
from .nodes import NodesError

EXIT_INCOMPLETE = 2
_FLAGS = ("hostfile", "ssh_port", "ssh_config", "ssh_host_keys")
_USAGE = "finebridge nodes setup; it tells more with --help"
_SHOWN = ("name", "sshd", "host key", "login")  # what a login needs, in this order
# What ssh says when it fails -> what of _SHOWN is missing, and how that is said in the table.
_MEANING = (
    (r"Could not resolve hostname|Name or service not known", "name", "does not resolve"),
    (r"Connection refused", "sshd", "nobody listens"),
    (r"timed out|No route to host|Network is unreachable", "sshd", "no answer"),
    (r"kex_exchange_identification|[Bb]anner|Connection (closed|reset)", "sshd", "hangs up"),
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "host key", "CHANGED"),
    (r"Host key verification failed|host key is known", "host key", "not known"),
    (r"Permission denied", "login", "refused"),
)
_INSTALL = "test -x /usr/sbin/sshd || { apt-get update && apt-get install -y --no-install-recommends openssh-server; }"


@dataclass(slots=True)
class Door:
    """How ssh would reach a node (``ssh -G``), and what is missing there: "" or one of _SHOWN, with ssh's own words."""

    host: str
    user: str = ""
    name: str = ""  # what the host is called to the network
    port: str = ""
    keys: list[str] = field(default_factory=list[str])
    known: str = "~/.ssh/known_hosts"
    alias: str = ""
    missing: str = ""
    found: str = ""

    @property
    def label(self) -> str:
        """The node in known_hosts."""
        return self.alias or (self.name if self.port == "22" else f"[{self.name}]:{self.port}")


@dataclass(frozen=True, slots=True)
class Step:
    """Commands for one machine, and why."""

    machine: str
    why: str
    commands: tuple[str, ...]


def main(words: Sequence[str]) -> int:
    """Run the verb; exit code 0 when every node is reached, else 2. Raises ValueError for bad input."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if not words or words[0] != "setup":
        raise ValueError(_USAGE)
    values = read_flags(words[1:])
    if unknown := values.keys() - set(_FLAGS):
        raise NodesError(f"--{min(unknown)}: {', '.join(f'--{name}' for name in _FLAGS)} are known here")
    where = cluster.take(dict(values), os.environ, None, lambda: 1)
    if where.slurm and shutil.which("srun"):
        print("these are the nodes of a Slurm job: srun starts them, no ssh is needed")
        return 0
    if not where.remote:
        raise NodesError("no other machine is named: export NODE_IP_LIST=HOST:SLOTS,HOST:SLOTS, or give --hostfile")
    if absent := [tool for tool in ("ssh", "ssh-keygen", "ssh-keyscan") if not shutil.which(tool)]:
        raise NodesError(f"{absent[0]} is not installed here: apt-get update && apt-get install -y openssh-client pdsh")
    hosts = [node.host for number, node in enumerate(where.nodes) if number != where.here]
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        doors = list(pool.map(knock, hosts, [where.ssh] * len(hosts)))
    steps = _here(doors)
    explained = ("login",) if steps else ()  # without a key of this machine that ssh takes, none can be known there
    steps += [step for door in doors if door.missing and door.missing not in explained for step in _there(door)]
    if not steps:
        print(f"ssh reaches {'all ' if len(hosts) > 1 else ''}{', '.join(hosts)} without a password")
        return 0
    print(_table(doors, None if where.here is None else where.nodes[where.here].host))
    _tell(steps)
    return EXIT_INCOMPLETE


def knock(host: str, ssh: Ssh) -> Door:
    """Log in to a node and do nothing there, as a run would; what ssh makes of the host, and what is missing."""
    door, options = Door(host), ssh.options()
    asked = _run(["ssh", "-G", *options, "--", host])
    if asked.returncode:
        door.missing, door.found = "name", f"ssh: {_last(asked.stderr)}"
        return door
    settings = [(name, value) for name, _, value in (line.partition(" ") for line in asked.stdout.splitlines())]
    first = dict(reversed(settings))
    door.user, door.name, door.port = first["user"], first["hostname"], first["port"]
    door.keys, door.alias = [value for name, value in settings if name == "identityfile"], first.get("hostkeyalias", "")
    door.known = first.get("userknownhostsfile", door.known).split()[0]
    tried = _run(["ssh", *options, "--", host, "true"])
    if tried.returncode:
        meant = next((words for pattern, *words in _MEANING if re.search(pattern, tried.stderr)), None)
        door.missing, door.found = meant or ("login", f"ssh: {_last(tried.stderr)}")
    return door


def _here(doors: Sequence[Door]) -> list[Step]:
    """What this machine lacks: files that only its user may read or change, and a key that needs nobody to type."""
    private = [(_home() / ".ssh", "700", 0o022), (_home() / ".ssh" / "config", "600", 0o022)]
    private += [(key, "600", 0o077) for key in dict.fromkeys(key for door in doors for key in _keys(door))]
    wrong = [(path, mode) for path, mode, rights in private if path.exists() and path.stat().st_mode & rights]
    if wrong:
        commands = tuple(f"chmod {mode} {_shown(path)}" for path, mode in wrong)
        return [Step("this machine", "others may change or read what is only this user's:", commands)]
    return list(dict.fromkeys(step for door in doors if door.missing and door.user for step in _key(door)))


def _key(door: Door) -> list[Step]:
    """A key for a node, unless one is here that ssh can use."""
    keys = _keys(door)
    if any(map(_usable, keys)) or _run(["ssh-add", "-l"]).returncode == 0:
        return []
    if keys:
        commands = ('eval "$(ssh-agent)"', f"ssh-add {_shown(keys[0])}")
        return [Step("this machine", "the key has a passphrase, and no agent is here that knows it:", commands)]
    place = _path(next((key for key in door.keys if key.endswith("ed25519")), "~/.ssh/id_ed25519"))
    commands = (
        f"mkdir -p -m 700 {_shown(place.parent)}",
        f"ssh-keygen -q -t ed25519 -N '' -f {_shown(place)}",
    )
    return [Step("this machine", "no key is here that ssh would offer; this one is without a passphrase:", commands)]


def _there(door: Door) -> list[Step]:
    """What is to be done for a node, beginning with what is missing; what comes after that could not be tried."""
    machine = f"{door.host}, as {door.user}" if door.user else door.host
    if door.found.startswith("ssh: "):  # in words that are not known here
        port = f"-p {door.port} " if door.port else ""
        why = f"{door.host}: {door.found}; this shows all that is tried:"
        return [Step("this machine", why, (f"ssh -v {port}{shlex.quote(door.host)} true",))]
    if door.missing == "name":
        why = f"{door.host} {door.found}. Give its address in the list of nodes, or name it here; hostname -I there shows it:"
        return [Step("this machine", why, (f"echo 'ADDRESS {door.host}' >> /etc/hosts",))]
    steps = [_sshd(door, machine)] if door.missing == "sshd" else []
    if door.missing == "host key":
        steps += _host_key(door, machine)
    if line := _public(door):
        commands = (
            "mkdir -p -m 700 ~/.ssh",
            f"echo {shlex.quote(line)} >> ~/.ssh/authorized_keys",
            "chmod go-w ~ ~/.ssh",
            "chmod 600 ~/.ssh/authorized_keys",
        )
        tried = "" if door.missing == "login" else " (unless it is; that could not be tried yet)"
        why = f"this machine's key is not among ~/.ssh/authorized_keys, or others may change that file{tried}:"
        steps.append(Step(machine, why, commands))
    return steps


def _sshd(door: Door, machine: str) -> Step:
    """An sshd on a port of one's own. It takes keys only, and one that root starts takes those of every user."""
    if door.user == "root":
        keys, options = ("mkdir -p -m 755 /run/sshd", "ssh-keygen -A"), ""
    else:
        keys = (
            "mkdir -p -m 700 ~/.ssh",
            "test -e ~/.ssh/sshd_key || ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/sshd_key",
        )
        options = " -h ~/.ssh/sshd_key -o UsePAM=no -o PidFile=none"
    start = f"/usr/sbin/sshd -p {door.port}{options} -o PasswordAuthentication=no"
    words = {
        "nobody listens": "no sshd is there",
        "no answer": "nothing comes back (is the machine up, and the port open between the nodes?); if no sshd runs",
    }.get(door.found, "what listens there hangs up; if that is no sshd, choose another port (--ssh_port)")
    return Step(machine, f"port {door.port}: {words}:", (_INSTALL, *keys, start))


def _host_key(door: Door, machine: str) -> list[Step]:
    """Take over the key that the node shows, when it is the node's own."""
    scan = _run(["ssh-keyscan", "-T", "5", "-t", "ed25519,ecdsa,rsa", "-p", door.port, "--", door.name])
    lines = [line.split() for line in scan.stdout.splitlines() if not line.startswith("#")]
    known = _shown(_path(door.known))
    again = (f"ssh-keygen -R {shlex.quote(door.label)} -f {known}",) if door.found == "CHANGED" else ()
    if not lines:
        connect = f"ssh -p {door.port} {shlex.quote(door.host)} true"
        return [Step("this machine", f"the host key of {door.host} is {door.found}; compare it:", (*again, connect))]
    key = " ".join(min(lines, key=lambda words: "ed25519" not in words[1])[1:3])
    fingerprint = "".join(_run(["ssh-keygen", "-lf", "-"], key).stdout.split()[1:2])
    show = "for key in /etc/ssh/ssh_host_*_key.pub ~/.ssh/sshd_key.pub; do test ! -e $key || ssh-keygen -lf $key; done"
    changed = " (it was another one: was the node set up anew?)" if again else ""
    why = f"its host key, as seen from here, is {fingerprint}{changed}. Go on only if this shows the same:"
    take = f"echo {shlex.quote(f'{door.label} {key}')} >> {known}"
    return [
        Step(machine, why, (show,)),
        Step(
            "this machine", f"the host key of {door.host} is {door.found}. When it is the node's own:", (*again, take)
        ),
    ]


def _table(doors: Sequence[Door], here: str | None) -> str:
    """A row a node."""
    rows: list[tuple[str, ...]] = [("node", "port", *_SHOWN)]
    if here is not None:
        rows.append((here, "-", "this machine", "-", "-", "-"))
    for door in doors:
        at = _SHOWN.index(door.missing) if door.missing else len(_SHOWN)
        cells = ["ok"] * at + ([door.found] if door.missing else [])
        rows.append((door.host, door.port or "-", *cells, *["-"] * (len(_SHOWN) - len(cells))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _tell(steps: Sequence[Step]) -> None:
    """The steps by machine, each a comment and commands for a shell."""
    for machine in dict.fromkeys(step.machine for step in steps):
        print(f"\non {machine}:")
        for step in steps:
            if step.machine == machine:
                print("\n".join([f"  # {step.why}", *(f"  {command}" for command in step.commands)]))
    print("\nthen call nodes setup again")


def _keys(door: Door) -> list[Path]:
    """The private keys that ssh would offer and that exist."""
    return [path for path in map(_path, door.keys) if path.exists()]


def _public(door: Door) -> str:
    """The line of the first key for authorized_keys, of a file or else of an agent; "" without a key."""
    for key in _keys(door):
        public = key.with_name(f"{key.name}.pub")
        text = public.read_text(errors="replace") if public.exists() else _run(_public_of(key)).stdout
        if text.strip():
            return text.strip().splitlines()[0]
    listed = _run(["ssh-add", "-L"])
    return "" if listed.returncode else listed.stdout.splitlines()[0]


def _public_of(key: Path) -> list[str]:
    """Derives the public key, if there is no passphrase."""
    return ["ssh-keygen", "-y", "-P", "", "-f", str(key)]


def _usable(key: Path) -> bool:
    """Whether a key has no passphrase."""
    return _run(_public_of(key)).returncode == 0


def _home() -> Path:
    """``~`` as ssh takes it, which does not ask HOME."""
    return Path(pwd.getpwuid(os.getuid()).pw_dir)


def _path(text: str) -> Path:
    return _home() / text.removeprefix("~/") if text.startswith("~/") else Path(text)


def _shown(path: Path) -> str:
    """A path as a shell takes it, ``~`` for the home."""
    return (
        f"~/{shlex.quote(str(path.relative_to(_home())))}" if path.is_relative_to(_home()) else shlex.quote(str(path))
    )


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it fails without a word"])[-1]


def _run(command: list[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 - an argument list, no shell
