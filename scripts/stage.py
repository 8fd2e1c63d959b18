"""What the scripts share that set a server and an agent up and drive them: a private PostgreSQL, processes, status."""

import contextlib
import http.server
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PGBIN, WALGUARD = os.environ["PGBIN"], os.environ["WALGUARD"]
USER = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
ACCOUNT = {"user": USER.pw_uid, "group": USER.pw_gid, "extra_groups": []} if USER else {}


def as_postgres(command, **options):
    """The server refuses to run as root."""
    return subprocess.Popen(command, cwd="/", **ACCOUNT, **options)


def run(command, **options):
    process = as_postgres(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    _, error = process.communicate()
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: {error.decode()}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Webhook:
    """Takes messages, and keeps each with the moment at which it came."""

    def __init__(self):
        self.came = came = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                at = time.time()
                came.append((at, json.loads(self.rfile.read(int(self.headers["content-length"])))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def settings(self):
        return f'[notify.hook]\nkind = "webhook"\nurl = "http://127.0.0.1:{self.server.server_port}/"\n'

    def shutdown(self):
        self.server.shutdown()


def wait(what, condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            sys.exit(f"error: waited {seconds} s in vain for {what}")
        time.sleep(0.05)


def status(port):
    """What the agent says of itself; nothing if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return {}


def wait_caught_up(sql, port):
    """Waits until the agent has looked at all WAL that is flushed now."""
    sql.execute("SELECT pg_current_wal_flush_lsn()::text")
    goal = sql.fetchone()[0]

    def caught_up():
        position = (status(port).get("scan") or {}).get("position") or {}
        sql.execute("SELECT %s::pg_lsn >= %s::pg_lsn", (position.get("lsn", "0/0"), goal))
        return sql.fetchone()[0]

    wait("the agent to have caught up", caught_up)


@contextlib.contextmanager
def scratch(name):
    """A folder that the server's account may write to; it goes at the end, unless KEEP is set."""
    space = tempfile.mkdtemp(prefix=f"walguard-{name}-")
    os.chmod(space, 0o755)
    if USER:
        shutil.chown(space, "postgres")
    try:
        yield space
    finally:
        if not os.environ.get("KEEP"):
            shutil.rmtree(space, ignore_errors=True)


@contextlib.contextmanager
def server(space, name, *options):
    """A running PostgreSQL; gives its port."""
    port, data = free_port(), os.path.join(space, name)
    run([f"{PGBIN}/initdb", "-U", "postgres", "-A", "trust", "-N", "-D", data])
    settings = " ".join(f"-c {option}" for option in ("listen_addresses=127.0.0.1", "shared_buffers=256MB", *options))
    log = os.path.join(space, f"{name}.log")
    run([f"{PGBIN}/pg_ctl", "-w", "-D", data, "-l", log, "-o", f"-p {port} -k {space} {settings}", "start"])
    try:
        yield port
    finally:
        subprocess.run([f"{PGBIN}/pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False,
                       stdout=subprocess.DEVNULL, cwd="/", **ACCOUNT)


@contextlib.contextmanager
def process(command, **options):
    """A process that is asked to end at the end."""
    running = as_postgres(command, **options)
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def dsn(port, database="postgres"):
    return f"host=127.0.0.1 port={port} user=postgres dbname={database}"


def pgbench(port, *options, database="postgres"):
    return [f"{PGBIN}/pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", *options, database]
