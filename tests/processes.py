"""Real processes for the tests: two that know each other, and a module under torchrun."""
import os
import socket
import subprocess
import sys
import tempfile
import time


def two_ranks(program, *arguments, timeout=300):
    "Run `program` as two processes without anyone to look after them: exit codes, what they said, and the seconds between their ends."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    said, ended, limit = [tempfile.TemporaryFile("w+") for _ in range(2)], {}, time.monotonic() + timeout
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env={**environment, "RANK": str(rank)}, stderr=f) for rank, f in enumerate(said)]
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
