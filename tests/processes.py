"""Real processes for the tests: forks, two that know each other, a module under torchrun, and who trains in a folder."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def forked(act):
    "The id of a forked process that runs `act` in a session of its own, silent but for errors; to be waited for with `ended`."
    if child := os.fork(): return child
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        quiet, loud = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        act()
        status = 0
    except SystemExit as e: status = e.code
    except Exception: os.write(loud, traceback.format_exc().encode())
    finally: os._exit(status)


def ended(child):
    "The exit status of a forked process as the shell's (negative: the signal that killed it)."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def apart(act):
    "Run `act` in a forked process; its exit status."
    return ended(forked(act))


def processes_of(folder):
    "{rank: process id} of the processes that train in `folder`; one alone is rank 0."
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try: words, settings = (place/"cmdline").read_bytes().split(b"\0"), (place/"environ").read_bytes().split(b"\0")
        except OSError: continue   # it ended while we looked
        starts = any(w.startswith((b"torch.distributed", b"deepspeed")) for w in words)
        rank = next((int(s[5:]) for s in settings if s.startswith(b"RANK=")), None if starts else 0)
        if str(folder).encode() in words and rank is not None: found[rank] = int(place.name)
    return found


def until(happened, limit=300):
    "Wait until `happened()`; its value."
    end = time.monotonic() + limit
    while not (value := happened()) and time.monotonic() < end: time.sleep(.05)
    assert value, "it did not happen in time"
    return value


def two_ranks(program, *arguments, timeout=300):
    "Run `program` as two processes without anyone to look after them: exit codes, what they said, and the seconds between their ends."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    said, ended, limit = [tempfile.TemporaryFile("w+") for _ in range(2)], {}, time.monotonic() + timeout
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env={**environment, "RANK": str(rank)}, stderr=f)
               for rank, f in enumerate(said)]
    while len(ended) < 2 and time.monotonic() < limit:
        ended = {**{p: time.monotonic() for p in started if p.poll() is not None}, **ended}
        time.sleep(.05)
    for p in started: p.kill()
    for f in said: f.seek(0)
    return [p.wait() for p in started], [f.read() for f in said], max(ended.values()) - min(ended.values())


def torchrun(*words, ranks=2):
    "Run a module under torchrun."
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", *map(str, words)],
                          capture_output=True, text=True, timeout=300)


def command(*words):
    "Run a verb of the command line in this process; what its function returns, and its errors as they are."
    from typer.main import get_command

    from medvlm3d.front.cli import app
    return get_command(app).main([str(word) for word in words], standalone_mode=False)
